"""What can't be seen by looking at a model, as data: one `Architecture` for each `model_type`.

How a model computes is left to Transformers, and where its parts are is seen in the model itself (structure.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """How llama.cpp represents the architecture."""

    name: str
    """The architecture's name, in `general.architecture` and as the prefix of its sizes."""
    activation: str
    """The `hidden_act` that llama.cpp computes, which is also Transformers' default."""
    interleaved: Mapping[str, str]
    """Linears whose output rope rotates in neighbouring pairs in llama.cpp, and between the halves of a head in
    Transformers: the last part of the name -> the field of config.json that counts the heads."""
    splits: Mapping[str, str]
    """Regular expressions with which this architecture's tokenizers split a text -> llama.cpp's name of each."""


@dataclass(frozen=True, kw_only=True)
class LogitFields:
    """What is done to the output of the head before the softmax, in this order: the fields of config.json with the
    numbers. A field that is None or not there changes nothing."""

    multiplied_by: str | None = None
    divided_by: str | None = None
    capped_at: str | None = None
    """c in c tanh(logits / c)."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A causal language model, as Transformers implements it."""

    model_type: str
    """As in config.json and Transformers' Auto classes."""
    packs: bool
    """Whether training it on packed rows is known to equal Transformers' own, example by example. It needs rotary or
    learnt positions that follow `position_ids`, and no attention but that of model/attention.py."""
    pads: bool = True
    """Whether padding leaves examples as they are; False where that is known to change them."""
    logits: LogitFields = LogitFields()
    gguf: GgufLayout | None = None
    """None if it can't be written as GGUF."""
