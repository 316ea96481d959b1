"""Pieces of text become token ids and labels, kept in a memory-mapped Arrow file that is keyed by its content.

A row is tokenised piece by piece, so that a training prompt has exactly the ids that the same prompt has when the
model is asked: no token ever spans the border between prompt and response. Labels are -100 wherever nothing is learnt.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from huarizo.data.prompts import PromptFormat, Turn
from huarizo.data.records import Flaw
from huarizo.data.rows import Problem, Row
from huarizo.data.spans import Piece, RefusedRow
from huarizo.data.turns import Exchange
from huarizo.errors import DataError, ModelError
from huarizo.files import remove_leftovers, write_whole, writing
from huarizo.sandbox.reading import interruptible, open_file

IGNORED = -100
CHUNK = 1000  # rows tokenised in one call
LAYOUT = 3  # of the cached file; part of its key
DAY = 86400  # seconds


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as the model sees it: `input_ids` and `labels` of the same length; -100 = not learnt."""

    input_ids: list[int]
    labels: list[int]
    was_cut: bool


class Encoder:
    """Tokenises conversations for training, and prompts for generation, with the same code.

    Args:
        tokenizer: a Transformers tokenizer.
        prompt: the prompt format.
        labels: `response` learns responses and their stop token, `all` learns every token but the first; `auto` is
            `response` for conversations and `all` for plain texts. An answer that is only to be read never is learnt.
        max_length: tokens; what is beyond is cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: PromptFormat,
        labels: Literal["auto", "response", "all"] = "auto",
        max_length: int = 512,
    ) -> None:
        self.tokenizer, self.prompt, self.max_length = tokenizer, prompt, max_length
        self.labels: Literal["auto", "response", "all"] = labels
        self.stop_id: int | None = tokenizer.convert_tokens_to_ids(prompt.stop) if prompt.stop else None
        (first,) = self._encoded(["a"])
        self._bos = tokenizer.bos_token_id if first[:1] == [tokenizer.bos_token_id] else None
        # SentencePiece writes a space before a text; a continuation has none. A line break, which never merges with
        # what follows it, stands in front while it is tokenised and is taken off again.
        self._anchor = self._ids(["\n"])[0]
        if self._ids(["a"])[0] == self._ids(["\na"])[0][len(self._anchor) :]:
            self._anchor = []

    @property
    def adds_bos(self) -> bool:
        """Whether a conversation begins with the tokenizer's beginning-of-sequence token."""
        return self._bos is not None

    def _ids(self, texts: list[str], literal: bool = False) -> list[list[int]]:
        if not texts:
            return []
        return self._encoded(texts, add_special_tokens=False, split_special_tokens=literal)

    def _encoded(self, texts: list[str], **options: bool) -> list[list[int]]:
        """Raises ModelError: the tokenizer gives up on a text."""
        try:
            return interruptible(lambda: self.tokenizer(texts, **options)["input_ids"])
        except Exception as error:  # whatever a foreign tokenizer sets off
            where = getattr(self.tokenizer, "name_or_path", "")
            raise ModelError(f"{where}: the tokenizer can't encode these texts: {error}") from None

    def _continuations(self, texts: list[str], literal: bool = False) -> list[list[int]]:
        if not self._anchor:
            return self._ids(texts, literal)
        return [ids[len(self._anchor) :] for ids in self._ids(["\n" + text for text in texts], literal)]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        """Plain texts with the special tokens that are written in them, and those that the tokenizer puts around a
        text, which are there once where a text brings them along."""
        if not texts:
            return []
        tokenizer = self.tokenizer
        found = self._encoded(texts)
        twice = [tokenizer.bos_token_id] * 2, [tokenizer.eos_token_id] * 2
        return [ids[ids[:2] == twice[0] : len(ids) - (ids[-2:] == twice[1])] for ids in found]

    def _tokenised(self, conversations: Sequence[list[Piece]]) -> Iterator[list[tuple[list[int], bool]]]:
        """Each conversation as (ids, learnt) runs, in few calls of the tokenizer."""
        if self.labels == "all":
            conversations = [_all_learnt(pieces) for pieces in conversations]
        heads = [pieces[0] for pieces in conversations]
        firsts = iter(self._ids([piece.text for piece in heads if piece.kind != "text"]))
        texts = iter(self._whole([piece.text for piece in heads if piece.kind == "text"]))
        later = [piece for pieces in conversations for piece in pieces[1:]]
        written = iter(self._continuations([piece.text for piece in later if piece.kind in ("prompt", "opening")]))
        responses = iter(self._continuations([piece.text for piece in later if piece.kind == "response"], literal=True))
        for pieces in conversations:
            first = next(texts if pieces[0].kind == "text" else firsts)
            if self._bos is not None and first[:1] != [self._bos]:
                first = [self._bos, *first]
            runs = [(first, self._learns(pieces[0]))]
            for piece in pieces[1:]:
                if piece.kind == "stop":
                    ids = [self.stop_id] if self.stop_id is not None else []
                else:
                    ids = next(responses if piece.kind == "response" else written)
                runs.append((ids, self._learns(piece)))
            yield runs

    def _learns(self, piece: Piece) -> bool:
        return piece.learnt and (piece.kind != "prompt" or self.labels == "all")

    def by_row(self, rows: Sequence[Row]) -> Iterator[list[Example] | Flaw]:
        """For each row, in order, its examples: several where the chat template rewrites earlier turns, none where
        nothing that is learnt lies within `max_length`. Or what is wrong with a row that the format refuses."""
        iterator = iter(rows)
        while chunk := list(itertools.islice(iterator, CHUNK)):
            found = [self._conversations(row) for row in chunk]
            every = self._tokenised([each for one in found if isinstance(one, list) for each in one])
            for one in found:
                if isinstance(one, Flaw):
                    yield one
                else:
                    examples = [self._example(runs) for runs in itertools.islice(every, len(one))]
                    yield [example for example in examples if example is not None]

    def encode(self, rows: Sequence[Row]) -> Iterator[Example | None]:
        """Examples of the rows, in order; None for a row of which nothing that is learnt lies within `max_length`.

        Raises:
            DataError: the prompt format refuses a row; the message names it.
        """
        for row, found in zip(rows, self.by_row(rows), strict=True):
            if isinstance(found, Flaw):
                raise DataError(str(Problem(row.file, row.number, *found)))
            yield from found or [None]

    def _conversations(self, row: Row) -> list[list[Piece]] | Flaw:
        if row.text and self.labels == "response":
            what = "is a plain text, of which no part is a response"
            return Flaw("text", what, "Use data.labels=auto or all, which learn all of it")
        if row.text:
            return [[Piece("text", row.text)]]
        try:
            return self.prompt.examples(row.system, row.exchanges, row.tools)
        except RefusedRow as error:
            return error.flaw

    def _example(self, runs: list[tuple[list[int], bool]]) -> Example | None:
        input_ids = [i for ids, _ in runs for i in ids]
        labels = [i if learnt else IGNORED for ids, learnt in runs for i in ids]
        kept, learnt = input_ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in learnt[1:]):
            return None
        return Example(kept, learnt, was_cut=len(input_ids) > self.max_length)

    def encode_prompt(self, system: str, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation whose last turn has no answer yet, as the model was trained to read it."""
        (runs,) = self._tokenised([self.prompt.pieces(system, turns)])
        return [i for ids, _ in runs for i in ids]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text outside any conversation; special tokens in it are plain text."""
        (ids,) = self._ids([text], literal=True)
        return [self._bos, *ids] if self._bos is not None else ids

    def within(self, positions: int) -> "Encoder":
        """The same, with rows cut at the model's positions where `max_length` is more."""
        if self.max_length <= positions:
            return self
        return Encoder(self.tokenizer, self.prompt, self.labels, positions)

    def check_embedding(self, largest: int, size: int) -> None:
        """Raises ModelError: an embedding of `size` rows has none for the token id `largest`."""
        if largest >= size:
            raise ModelError(
                f"the tokenizer has {self.vocabulary:,} tokens, but the model's embedding has only {size:,}, and the "
                f"data uses one beyond it ({self.tokenizer.convert_ids_to_tokens(largest)!r}). Use the tokenizer that "
                "belongs to this model, or a model whose embedding was made larger with it"
            )

    @property
    def vocabulary(self) -> int:
        """How many rows an embedding for all tokens of the tokenizer has."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def fingerprint(self) -> str:
        """A hash of everything but the rows that decides the ids."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = [
            LAYOUT, backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())),
            tokenizer.chat_template, self.prompt.name, self.prompt.date, self.prompt.stop, self.stop_id, self._bos,
            self.labels, self.max_length, [piece.kind for piece in self.prompt.pieces("", [Exchange("i", "", "o")])],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _all_learnt(pieces: list[Piece]) -> list[Piece]:
    """A conversation all of which is learnt, as the one text that it is; its pieces where an answer is only read."""
    if all(piece.learnt for piece in pieces) and pieces[0].kind != "text":
        return [Piece("prompt", "".join(piece.text for piece in pieces))]
    return pieces


@dataclass(frozen=True)
class TokenisedRows:
    """`dataset` has columns input_ids, labels (lists of int32) and row (int64, an index into the rows).

    A row may have several examples. `cut` and `left_out` are indices of rows that were shortened, or had no response
    within `max_length`; `refused` those that the prompt format can't write, and why. `largest`: of all token ids.
    `fingerprint` is a hash of the rows and of everything else that decides the ids.
    """

    dataset: Any
    cut: list[int]
    left_out: list[int]
    fingerprint: str
    refused: dict[int, Flaw]
    largest: int


def tokenise(rows: Sequence[Row], encoder: Encoder, cache: Path) -> TokenisedRows:
    """Token ids of all rows, from the cache folder where they are there already.

    The file's name is a hash of the rows, the tokenizer and the settings; it appears whole or not at all.

    Raises:
        DataError: no row has a response within `max_length`.
    """
    import pyarrow as pa
    from datasets import Dataset

    digest = hashlib.sha256(encoder.fingerprint().encode())
    for row in rows:
        content = (row.system, row.exchanges, row.tools, row.text)
        digest.update(repr(content).encode("utf-8", "surrogatepass"))
    path = cache / f"{digest.hexdigest()[:40]}.arrow"
    if not _is_whole(path):
        with writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
        remove_leftovers(cache, older_than=DAY)
        write_whole(path, lambda file: _write_with_digest(file, rows, encoder))
    with pa.memory_map(str(path)) as source:
        facts = json.loads((pa.ipc.open_stream(source).schema.metadata or {})[b"huarizo"])
    refused = {number: Flaw(*flaw) for number, *flaw in facts["refused"]}
    result = TokenisedRows(
        Dataset.from_file(str(path)), facts["cut"], facts["left_out"], digest.hexdigest(), refused, facts["largest"]
    )
    if not refused:
        require_examples(result, len(rows), encoder.max_length)
    return result


def require_examples(tokenised: TokenisedRows, rows: int, max_length: int) -> None:
    """Raises DataError: of so many rows that can be written none has a response within `max_length`."""
    if not len(tokenised.dataset):
        raise DataError(
            f"none of the {rows} rows has any of its response within data.max_length={max_length} tokens. "
            "Raise data.max_length, or shorten the prompts"
        )


class _Hashed:
    """A file whose bytes are hashed as they are written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.closed = False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write_with_digest(file: BinaryIO, rows: Sequence[Row], encoder: Encoder) -> None:
    """The Arrow stream, and behind its end the sha256 of all that: a damaged cache is made anew, never trained on."""
    hashed = _Hashed(file)
    _write_arrow(hashed, rows, encoder)
    file.write(hashed.digest.digest())


def _is_whole(path: Path) -> bool:
    try:
        with open_file(path) as file:
            digest, rest = hashlib.sha256(), os.fstat(file.fileno()).st_size - hashlib.sha256().digest_size
            while rest > 0 and (block := file.read(min(rest, 1 << 20))):
                digest.update(block)
                rest -= len(block)
            return rest == 0 and file.read() == digest.digest()
    except OSError:
        return False


def _write_arrow(file: Any, rows: Sequence[Row], encoder: Encoder) -> None:
    import pyarrow as pa

    ids: list[Any] = []
    labels: list[Any] = []
    index: list[int] = []
    facts: dict[str, Any] = {"cut": [], "left_out": [], "refused": [], "largest": encoder.stop_id or 0}
    for number, found in enumerate(encoder.by_row(rows)):
        if isinstance(found, Flaw):
            facts["refused"].append([number, *found])
            continue
        if not found:
            facts["left_out"].append(number)
        if any(example.was_cut for example in found):
            facts["cut"].append(number)
        for example in found:
            ids.append(np.array(example.input_ids, dtype=np.int32))
            labels.append(np.array(example.labels, dtype=np.int32))
            index.append(number)
    facts["largest"] = max([facts["largest"], *(int(each.max()) for each in ids)])
    tokens = pa.list_(pa.int32())
    schema = pa.schema(
        {"input_ids": tokens, "labels": tokens, "row": pa.int64()}, metadata={"huarizo": json.dumps(facts)}
    )
    with pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(ids), CHUNK):
            part = slice(start, start + CHUNK)
            writer.write_batch(
                pa.record_batch([pa.array(ids[part], tokens), pa.array(labels[part], tokens), index[part]], schema)
            )
