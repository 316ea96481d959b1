"""What the rest of the package asks of an architecture: where its parts are, how large, and what GGUF calls it.

How it computes is Transformers' own business. An architecture is a row of these fields in a file of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """How llama.cpp knows the architecture."""

    name: str
    """Of the architecture, in `general.architecture` and before the names of its sizes."""
    activation: str
    """`hidden_act` that llama.cpp computes; Transformers' default too."""
    interleaved: Mapping[str, str]
    """Linears whose output is rotated in neighbours by llama.cpp and in halves of a head by Transformers, by the last
    part of their names, each with the field of config.json that counts its heads."""
    splits: Mapping[str, str]
    """Patterns by which tokenizers of this architecture split a text, each with llama.cpp's name of it."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of decoders with rotary positions. Paths of modules are those in Transformers' causal model."""

    model_type: str
    """As config.json and Transformers' Auto classes have it."""
    described: str
    """Its name, and models that have it, in words for the user."""
    embedding: str
    """Path of the embedding of tokens."""
    layers: str
    """Path of the list of decoder layers."""
    norm: str
    """Path of the norm behind the last layer."""
    rotary_embedding: str
    """Path of what makes the rotary embeddings; its class takes the config alone."""
    head: str
    """Path of the output head."""
    shared_inputs: tuple[tuple[str, ...], ...]
    """All linears of a decoder layer, by their paths in it, those together that read the same activations."""
    sizes: tuple[str, ...]
    """Fields of config.json that have to be there and to be sizes."""
    layer_weights: Callable[[Mapping[str, Any]], float]
    """How many weights the linears of one layer have, of config.json."""
    layer_activation_bytes: Callable[[Mapping[str, Any], int], int]
    """Estimate of what one token keeps in a layer for the backward pass, in bytes, uncompiled and with LoRA everywhere;
    of config.json and the bytes of an activation."""
    gguf: GgufLayout | None = None
    """None: it can't be written as GGUF."""

    @property
    def vocabulary_layers(self) -> tuple[str, str]:
        """Last parts of the paths of embedding and head, which have a row for each token."""
        return self.embedding.rpartition(".")[2], self.head.rpartition(".")[2]
