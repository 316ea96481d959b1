"""Tokens beside those that a model was made with: in the tokenizer, in the embedding and in the head.

A tokenizer gets them behind its own ids; embedding and head get as many rows as there are tokens, unless they have
spare ones. A new row begins as the mean of the others, which is what Transformers' `resize_token_embeddings` begins
with but for a noise of 3e-5 standard deviations. So it is the same wherever an adapter is put on its base again.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch

from huarizo.errors import RecipeError

SETTING = "data.special_tokens"


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> None:
    """Make each text one token, in prompts and in answers alike, and one that a decoded answer shows.

    Tokens that Transformers calls special would be cut into pieces where an answer holds them, because what rows and
    people write must not end a turn; so these are added as ordinary ones that are never cut.

    Raises:
        RecipeError: a text marks sequences or turns already.
    """
    from tokenizers import AddedToken

    marks = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for text in texts:
        if text in marks or (text in special and text in (tokenizer.chat_template or "")):
            raise RecipeError(f"{SETTING}: {text!r} marks sequences or turns already. Leave it out")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    if special.intersection(texts):  # add_tokens leaves these special
        backend = tokenizer.backend_tokenizer
        spec = json.loads(backend.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in texts
        backend.__setstate__(json.dumps(spec).encode())


def size_of(tokenizer: Any) -> int:
    """The rows that an embedding needs for this tokenizer: its largest id and one."""
    return 1 + max(tokenizer.get_vocab().values())


def rows_to_train(tokenizer: Any, texts: Sequence[str], rows: int) -> list[int]:
    """Ids of these tokens, and of all others that an embedding of so many rows has none for; none without texts."""
    if not texts:
        return []
    return sorted({*tokenizer.convert_tokens_to_ids(list(texts)), *range(rows, size_of(tokenizer))})


def lengthened(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of an embedding's or head's weight [V, H] with at least so many rows; new ones are the mean of the old."""
    new = weight.float().mean(0).to(weight.dtype).expand(max(rows - len(weight), 0), -1)
    return torch.cat([weight, new])


def lengthen(model: Any, rows: int) -> None:
    """Give embedding and head of a float model at least so many rows, as `lengthened` says."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data = lengthened(layer.weight.data[:old], rows)
    model.tie_weights()
