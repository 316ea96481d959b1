"""What can't be seen by looking at a model, as data: one `Architecture` for each `model_type`.

How a model computes is left to Transformers, and where its parts are is seen in the model itself (structure.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """How llama.cpp represents the architecture, and what it computes whatever the configuration says."""

    name: str
    """The architecture's name, in `general.architecture` and as the prefix of its sizes."""
    numbers: Mapping[str, str]
    """Keys of GGUF, without that prefix -> the fields of config.json with the numbers. None is not written."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields of config.json -> the only values that llama.cpp computes."""
    check: Callable[[Any], str | None] | None = None
    """Says what else of a configuration llama.cpp does not compute."""
    activations: tuple[str, ...] = ("silu",)
    """The names of the activation that llama.cpp computes."""
    ropes: tuple[str, ...] = ("default", "linear")
    """The types of rope that llama.cpp computes; none for learnt positions."""
    partial_rope: bool = False
    """Whether rope may rotate a part of each head."""
    local_theta: bool = False
    """Whether layers with a window may have a base of rope of their own."""
    windows: bool = False
    """Whether llama.cpp computes sliding windows. Otherwise the file allows no longer texts than a window."""
    head: Literal["own", "shared", "either"] = "either"
    """Whether the head has a tensor of its own, or shares the embedding's."""
    one_plus_norms: bool = False
    """Whether the model multiplies by 1 + the weight of a norm, which llama.cpp does not."""
    interleaved: Mapping[str, str] = field(default_factory=dict)
    """Linears whose output rope rotates in neighbouring pairs in llama.cpp, and between the halves of a head in
    Transformers: the last part of the name -> the field of config.json that counts the heads."""
    by_head: str = ""
    """Last part of the name of the linear that gives q, k and v head by head; llama.cpp has all q first."""


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
