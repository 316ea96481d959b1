"""Adds tokens to a model: in the tokenizer, the embedding and the head.

The tokenizer appends them after its own ids; embedding and head get a row for each, unless they have spare ones. A new
row starts as the mean of the others, as in Transformers' `resize_token_embeddings` without its noise of 3e-5 standard
deviations. So it is the same every time the adapter is put on its base.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from huarizo.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTING = "data.special_tokens"


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> None:  # a fast tokenizer; its backend has no types
    """Make each text a single token, in prompts and answers, that decoding keeps.

    The tokens are added as ordinary ones, not as special ones: special tokens inside an answer are split into pieces,
    so that text from rows and users can't end a turn.

    Raises:
        RecipeError: a text already marks sequences or turns.
    """
    from tokenizers import AddedToken

    marks = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for text in texts:
        if text in marks or (text in special and text in (tokenizer.chat_template or "")):
            raise RecipeError(f"{SETTING}: {text!r} already marks sequences or turns. Leave it out")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    if special.intersection(texts):  # add_tokens leaves these special
        backend = tokenizer.backend_tokenizer
        spec = json.loads(backend.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in texts
        backend.__setstate__(json.dumps(spec).encode())


def size_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The rows that an embedding needs for this tokenizer: its largest id plus one."""
    return 1 + max(tokenizer.get_vocab().values())


def rows_to_train(tokenizer: Any, texts: Sequence[str], rows: int) -> list[int]:
    """The ids of these tokens and of all tokens without a row in an embedding of `rows` rows; [] without texts."""
    if not texts:
        return []
    return sorted({*tokenizer.convert_tokens_to_ids(list(texts)), *range(rows, size_of(tokenizer))})


def lengthened(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of an embedding's or head's weight [V, H] with at least `rows` rows; new ones are the mean of the old."""
    new = weight.float().mean(0).to(weight.dtype).expand(max(rows - len(weight), 0), -1)
    return torch.cat([weight, new])


def lengthen(model: Any, rows: int) -> None:  # a PreTrainedModel; its embedding and head have no types
    """Extend embedding and head of a float model to at least `rows` rows, as `lengthened` does."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data = lengthened(layer.weight.data[:old], rows)
    model.tie_weights()
