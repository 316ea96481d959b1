"""Tokenises pieces of text into ids and labels, and caches them in a memory-mapped Arrow file keyed by its content.

A row is tokenised piece by piece, so that a training prompt has exactly the ids that the same prompt has at inference:
no token spans the border between prompt and response. Labels are -100 for tokens that are not learnt.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypedDict

import numpy as np

from huarizo.data.prompts import PromptFormat, Turn
from huarizo.data.records import Flaw
from huarizo.data.rows import Problem, Row
from huarizo.data.spans import Piece, RefusedRow
from huarizo.data.turns import Exchange
from huarizo.errors import DataError, ModelError
from huarizo.files import remove_leftovers, write_whole, writing
from huarizo.sandbox.reading import interruptible, open_file

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Buffer

    from huarizo.data.templates import Tokenizer

Labels = Literal["auto", "response", "all"]
IGNORED = -100  # label of a token that is not learnt
CHUNK = 1000  # rows tokenised in one call
LAYOUT = 3  # version of the cached file's layout; part of its key
DAY = 86400  # seconds


class TokenisedRow(TypedDict):
    """An example as a row of the tokenised data set."""

    input_ids: list[int]
    labels: list[int]
    row: int


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as the model sees it.

    input_ids: [L] token ids. labels: [L], the same ids, or -100 where a token is not learnt. L is at most `max_length`.
    """

    input_ids: list[int]
    labels: list[int]
    was_cut: bool = False

    @classmethod
    def from_row(cls, row: TokenisedRow) -> "Example":
        """The example in a row of the tokenised data set."""
        return cls(row["input_ids"], row["labels"])


class Encoder:
    """Tokenises conversations for training and prompts for generation, with the same code.

    Args:
        tokenizer: a Transformers tokenizer.
        prompt: the prompt format.
        labels: `response` learns responses and their stop tokens; `all` learns every token but the first; `auto` is
            `response` for conversations and `all` for plain texts. An answer that is only read is never learnt.
        max_length: in tokens; longer examples are cut.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        prompt: PromptFormat,
        labels: Labels = "auto",
        max_length: int = 512,
    ) -> None:
        self.tokenizer: Any = tokenizer  # Transformers gives every special token and id the same union of types
        self.prompt, self.max_length = prompt, max_length
        self.labels: Labels = labels
        self.stop_id: int | None = self.tokenizer.convert_tokens_to_ids(prompt.stop) if prompt.stop else None
        (first,) = self._encode(["a"])
        bos: int | None = self.tokenizer.bos_token_id
        self._bos = bos if first[:1] == [bos] else None
        # SentencePiece adds a space before a text, which a continuation must not have. So a continuation is tokenised
        # after a line break, which never merges with what follows, and the line break is removed again.
        self._anchor = self._ids(["\n"])[0]
        if self._ids(["a"])[0] == self._ids(["\na"])[0][len(self._anchor) :]:
            self._anchor = []

    @property
    def adds_bos(self) -> bool:
        """Whether a conversation begins with the tokenizer's beginning-of-sequence token."""
        return self._bos is not None

    def _ids(self, texts: list[str], literal: bool = False) -> list[list[int]]:
        """Ids of each text without added special tokens. literal: special tokens in it are plain text."""
        if not texts:
            return []
        return self._encode(texts, add_special_tokens=False, split_special_tokens=literal)

    def _encode(self, texts: list[str], **options: bool) -> list[list[int]]:
        """The tokenizer's ids of each text. Raises ModelError if it fails."""
        try:
            return interruptible(lambda: self.tokenizer(texts, **options)["input_ids"])
        except Exception as error:  # a foreign tokenizer may raise anything
            where = getattr(self.tokenizer, "name_or_path", "")
            raise ModelError(f"{where}: the tokenizer can't encode these texts: {error}") from None

    def _continuations(self, texts: list[str], literal: bool = False) -> list[list[int]]:
        """Ids of texts that continue an earlier text."""
        if not self._anchor:
            return self._ids(texts, literal)
        return [ids[len(self._anchor) :] for ids in self._ids(["\n" + text for text in texts], literal)]

    def _plain_texts(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts, with the special tokens written in them and those that the tokenizer adds around a text.

        If a text already has the added ones, they are not repeated.
        """
        if not texts:
            return []
        tokenizer = self.tokenizer
        encoded = self._encode(texts)
        twice = [tokenizer.bos_token_id] * 2, [tokenizer.eos_token_id] * 2
        return [ids[ids[:2] == twice[0] : len(ids) - (ids[-2:] == twice[1])] for ids in encoded]

    def _tokenise(self, conversations: Sequence[list[Piece]]) -> Iterator[list[tuple[list[int], bool]]]:
        """Each conversation as runs of (ids, learnt), with few calls of the tokenizer."""
        if self.labels == "all":
            conversations = [_all_learnt(pieces) for pieces in conversations]
        heads = [pieces[0] for pieces in conversations]
        firsts = iter(self._ids([piece.text for piece in heads if piece.kind != "text"]))
        texts = iter(self._plain_texts([piece.text for piece in heads if piece.kind == "text"]))
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
        """The examples of each row, in order, or the flaw of a row that the prompt format refuses.

        A row has several examples if the chat template rewrites earlier turns, and none if it has nothing to learn
        within `max_length`.
        """
        iterator = iter(rows)
        while chunk := list(itertools.islice(iterator, CHUNK)):
            found = [self._conversations(row) for row in chunk]
            every = self._tokenise([each for one in found if isinstance(one, list) for each in one])
            for one in found:
                if isinstance(one, Flaw):
                    yield one
                else:
                    examples = [self._example(runs) for runs in itertools.islice(every, len(one))]
                    yield [example for example in examples if example is not None]

    def encode(self, rows: Sequence[Row]) -> Iterator[Example | None]:
        """Examples of the rows, in order; None for a row with nothing to learn within `max_length`.

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
        """Ids ([L], not cut) of a conversation whose last turn has no answer yet, as they are in training."""
        (runs,) = self._tokenise([self.prompt.pieces(system, turns)])
        return [i for ids, _ in runs for i in ids]

    def encode_text(self, text: str) -> list[int]:
        """Ids ([L], not cut) of a text outside any conversation; special tokens in it are plain text."""
        (ids,) = self._ids([text], literal=True)
        return [self._bos, *ids] if self._bos is not None else ids

    def limited_to(self, positions: int) -> "Encoder":
        """The same encoder, with `max_length` no more than the model's positions."""
        if self.max_length <= positions:
            return self
        return Encoder(self.tokenizer, self.prompt, self.labels, positions)

    def check_embedding(self, largest: int, size: int) -> None:
        """Check that an embedding of `size` rows has one for the token id `largest`.

        Raises:
            ModelError: it has none.
        """
        if largest >= size:
            raise ModelError(
                f"the tokenizer has {self.vocabulary:,} tokens, but the model's embedding has only {size:,}, and the "
                f"data uses one beyond it ({self.tokenizer.convert_ids_to_tokens(largest)!r}). Use the tokenizer that "
                "belongs to this model, or a model whose embedding was made larger with it"
            )

    @property
    def vocabulary(self) -> int:
        """How many rows an embedding needs for all tokens of the tokenizer."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def fingerprint(self) -> str:
        """A hash of everything that determines the ids, except for the rows."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = [
            LAYOUT, backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())),
            tokenizer.chat_template, self.prompt.name, self.prompt.date, self.prompt.stop, self.stop_id, self._bos,
            self.labels, self.max_length, [piece.kind for piece in self.prompt.pieces("", [Exchange("i", "", "o")])],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _all_learnt(pieces: list[Piece]) -> list[Piece]:
    """A conversation as one learnt piece, or unchanged if an answer in it is only read."""
    if all(piece.learnt for piece in pieces) and pieces[0].kind != "text":
        return [Piece("prompt", "".join(piece.text for piece in pieces))]
    return pieces


@dataclass(frozen=True)
class TokenisedRows:
    """The examples of a list of rows. A row may have several.

    dataset: columns input_ids and labels (int32 lists of one length, [L]) and row (int64, an index into the rows).
    cut: indices of rows that were shortened. left_out: indices of rows without a response within `max_length`.
    refused: indices of rows that the prompt format can't write, and why. largest: the largest token id.
    fingerprint: a hash of the rows and of everything else that determines the ids.
    """

    dataset: "Dataset"
    cut: list[int]
    left_out: list[int]
    fingerprint: str
    refused: dict[int, Flaw]
    largest: int

    @property
    def tokens(self) -> int:
        """How many tokens all examples have together."""
        column = self.dataset.data.column("input_ids")
        return sum(len(chunk.flatten()) for chunk in column.chunks)

    def first(self, count: int) -> list[TokenisedRow]:
        """The first examples, `count` at most."""
        rows: Any = self.dataset.select(range(min(count, len(self.dataset))))
        return list(rows)


def tokenise(rows: Sequence[Row], encoder: Encoder, cache: Path) -> TokenisedRows:
    """Tokenise all rows, or take their ids from the cache folder.

    The name of the cached file is a hash of the rows, the tokenizer and the settings. It is written whole or not at
    all, and replaced if it is damaged.

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
    if not _is_intact(path):
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
    """Check that at least one example is left, of this number of rows.

    Raises:
        DataError: no row has a response within `max_length`.
    """
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

    def write(self, data: "Buffer") -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write_with_digest(file: BinaryIO, rows: Sequence[Row], encoder: Encoder) -> None:
    """Write the Arrow stream followed by its sha256, so that a damaged cache is noticed and never trained on."""
    hashed = _Hashed(file)
    _write_arrow(hashed, rows, encoder)
    file.write(hashed.digest.digest())


def _is_intact(path: Path) -> bool:
    """Whether a cached file is there and ends with the sha256 of the rest."""
    try:
        with open_file(path) as file:
            digest, rest = hashlib.sha256(), os.fstat(file.fileno()).st_size - hashlib.sha256().digest_size
            while rest > 0 and (block := file.read(min(rest, 1 << 20))):
                digest.update(block)
                rest -= len(block)
            return rest == 0 and file.read() == digest.digest()
    except OSError:
        return False


def _write_arrow(file: _Hashed, rows: Sequence[Row], encoder: Encoder) -> None:
    """Write the dataset of `TokenisedRows`, with its other fields as JSON in the schema's metadata."""
    import pyarrow as pa

    ids: list[np.ndarray] = []  # [L] int32 each
    labels: list[np.ndarray] = []
    index: list[int] = []
    cut: list[int] = []
    left_out: list[int] = []
    refused: list[tuple[int, *tuple[str, ...]]] = []
    for number, found in enumerate(encoder.by_row(rows)):
        if isinstance(found, Flaw):
            refused.append((number, *found))
            continue
        if not found:
            left_out.append(number)
        if any(example.was_cut for example in found):
            cut.append(number)
        for example in found:
            ids.append(np.array(example.input_ids, dtype=np.int32))
            labels.append(np.array(example.labels, dtype=np.int32))
            index.append(number)
    largest = max([encoder.stop_id or 0, *(int(each.max()) for each in ids)])
    facts = {"cut": cut, "left_out": left_out, "refused": refused, "largest": largest}
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
