"""What the rest of the package needs to know about an architecture: where its parts are, their sizes, its GGUF names.

How it computes is left to Transformers. Each architecture is one `Architecture` in a file of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


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
class Architecture:
    """A decoder architecture with rotary positions. Module paths are those in Transformers' causal model."""

    model_type: str
    """As in config.json and Transformers' Auto classes."""
    described: str
    """Its name and some of its models, for messages."""
    embedding: str
    """Path of the token embedding."""
    layers: str
    """Path of the list of decoder layers."""
    norm: str
    """Path of the norm after the last layer."""
    rotary_embedding: str
    """Path of the module that computes the rotary embeddings; its class takes only the config."""
    head: str
    """Path of the output head."""
    shared_inputs: tuple[tuple[str, ...], ...]
    """Paths of all linears within a decoder layer, grouped by the activations that they read."""
    sizes: tuple[str, ...]
    """Fields of config.json that must be present and positive whole numbers."""
    layer_weights: Callable[[Mapping[str, Any]], float]
    """config.json -> the number of weights in the linears of one layer."""
    layer_activation_bytes: Callable[[Mapping[str, Any], int], int]
    """config.json, bytes of an activation -> estimate of the bytes that one token needs in a layer for the backward
    pass, uncompiled, with LoRA everywhere."""
    packs: bool = True
    """Whether it is known to keep packed examples apart; otherwise they are padded, and its own attention is used."""
    gguf: GgufLayout | None = None
    """None if it can't be written as GGUF."""

    @property
    def vocabulary_layers(self) -> tuple[str, str]:
        """Last parts of the paths of the embedding and the head, which have a row for each token."""
        return self.embedding.rpartition(".")[2], self.head.rpartition(".")[2]
