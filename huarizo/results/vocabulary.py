"""Writes a tokenizer into a GGUF file: tokens, their types, scores or merges, and the name of the pre-tokenizer.

A tokenizer that would give other token ids in llama.cpp is an error, because the model would see other prompts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf

from huarizo.data.tokens import Encoder
from huarizo.errors import ModelError, UserError
from huarizo.results.chat_template import chat_template, leading_space, space_everywhere
from huarizo.results.pre_tokenizers import pre_tokenizer

SENTENCEPIECE = "llama"  # as llama.cpp calls it, whatever the model


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms. SentencePiece has `scores`, byte-level BPE has `merges`."""

    kind: Literal["llama", "gpt2"]  # llama.cpp's names of the two
    pre: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None


def read_vocabulary(folder: Path, tokenizer: Any, size: int) -> Vocabulary:
    """Read a model's tokenizer, SentencePiece or byte-level BPE, padded to the embedding's rows.

    folder: the model's, for messages.
    size: rows of the embedding.

    Raises:
        ModelError: another kind of tokenizer, or a pre-tokenizer that llama.cpp does not have.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = spec["model"], {token["id"]: token for token in spec["added_tokens"]}
    if model["type"] != "BPE":
        raise ModelError(f"{folder}: a tokenizer of type {model['type']} can't be written as GGUF")
    odd = [token["content"] for token in added.values() if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if odd:
        raise ModelError(f"{folder}: llama.cpp would split a text with {odd[0]!r} differently (lstrip, rstrip)")
    ids = {number: text for text, number in model["vocab"].items()} | {n: t["content"] for n, t in added.items()}
    is_sentencepiece = bool(model.get("byte_fallback"))
    if is_sentencepiece:
        _check_sentencepiece(folder, spec)
    tokens, types = [], []
    for number in range(size):
        text = ids.get(number, f"[PAD{number}]")
        tokens.append(text.encode("utf-8"))
        types.append(_type(number, text, added, is_sentencepiece, model, number in ids))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    if is_sentencepiece:
        ranks = {merge.replace(" ", ""): float(-rank) for rank, merge in reversed(list(enumerate(merges)))}
        scores = [ranks.get(token.decode("utf-8"), float(-len(merges) - 1)) for token in tokens]
        return Vocabulary(SENTENCEPIECE, "default", tokens, types, scores, None)
    return Vocabulary("gpt2", pre_tokenizer(folder, spec), tokens, types, None, merges)


def _check_sentencepiece(folder: Path, spec: dict[str, Any]) -> None:
    """llama.cpp writes spaces as ▁, with or without one in front, and does nothing else to a text."""
    normalizer, pre = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *pre.get("pretokenizers", [pre])]
    spaces = {"String": " "}
    for step in steps:
        kind = step.get("type")
        as_spaces = kind == "Replace" and step["pattern"] == spaces and step["content"] == "▁"
        at_spaces = kind == "Split" and step["pattern"] == spaces  # where none are left
        if not (kind in (None, "Prepend", "Metaspace") or as_spaces or at_spaces):
            raise ModelError(f"{folder}: this tokenizer rewrites texts ({kind}), which llama.cpp does not")


def _type(number: int, text: str, added: dict[int, Any], is_sentencepiece: bool, model: Any, known: bool) -> int:
    if not known:
        return gguf.TokenType.UNUSED
    if is_sentencepiece and text == model.get("unk_token"):
        return gguf.TokenType.UNKNOWN
    if number in added:
        return gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
    if is_sentencepiece and len(text) == 6 and text.startswith("<0x"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, encoder: Encoder) -> None:
    """Write tokens, special tokens and the chat template.

    An answer ends at `eos_token_id`, and at `eot_token_id`: the prompt format's stop token if it is another one.

    Raises:
        UserError: no token ends an answer.
    """
    tokenizer = encoder.tokenizer
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    stop = encoder.stop_id if encoder.stop_id is not None else tokenizer.eos_token_id
    if stop is None:
        raise UserError("the tokenizer has no token that ends an answer, so a model in GGUF would never stop")
    writer.add_eos_token_id(stop if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
    if tokenizer.eos_token_id not in (None, stop):
        writer.add_eot_token_id(stop)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < len(vocabulary.tokens):
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(encoder.adds_bos)
    writer.add_add_eos_token(False)
    if vocabulary.kind == SENTENCEPIECE:
        writer.add_add_space_prefix(space_everywhere(encoder))
    if template := chat_template(encoder, leading_space(encoder)):
        writer.add_chat_template(template)
