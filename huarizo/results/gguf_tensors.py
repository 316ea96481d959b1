"""A model's tensors as llama.cpp expects them: their names, their number formats, and the order of their values."""

import math

import gguf
import numpy as np
import torch

from huarizo.errors import ModelError
from huarizo.model.architectures.architecture import GgufLayout
from huarizo.model.merge import MergedWeights

FP16_MAX = 65504
Format = gguf.GGMLQuantizationType


class Tensors:
    """The tensors of a model in GGUF.

    weights: the model's. layout: of its architecture. format: of matrices.

    Raises:
        ModelError: llama.cpp has no such tensor, or has one tensor for embedding and head where the model has two.
    """

    def __init__(self, weights: MergedWeights, layout: GgufLayout, format: Format) -> None:
        self._weights, self._layout, self._format = weights, layout, format
        known = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.name)
        self._known_names = gguf.get_tensor_name_map(known, weights.config["num_hidden_layers"])
        names = weights.names()
        if layout.head == "shared" and weights.head in names:
            raise ModelError(
                f"{weights.adapter or weights.base}: llama.cpp's {layout.name} has one tensor for embedding and head, "
                "and this model has two. `huarizo merge` writes an ordinary model folder"
            )
        if layout.head == "own" and weights.head not in names:
            names.append(weights.head)
        self.names = {name: self.name_of(name) for name in names}
        """The model's names -> llama.cpp's."""

    def name_of(self, name: str) -> str:
        """llama.cpp's name of a tensor."""
        found = self._known_names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"{self._weights.base}: llama.cpp's {self._layout.name} has no tensor {name}")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in the file."""
        shape = self._weights.shape(name)
        return shape[::-1] if self._is_transposed(name) else shape

    def format(self, name: str) -> Format:
        """Vectors and norms are in F32, as llama.cpp expects, and rows that Q8_0's blocks do not divide in F16."""
        shape = self.shape(name)
        if len(shape) == 1 or name.endswith("norm.weight"):
            return Format.F32
        if self._format == Format.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[Format.Q8_0][0]:
            return Format.F16
        return self._format

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor's values in its format.

        Raises:
            ModelError: they are too large for it.
        """
        weight, stored = self._weights[name], self.format(name)
        if self._layout.one_plus_norms and name.endswith("norm.weight"):
            weight = weight + 1
        if self._is_transposed(name):
            weight = weight.t().contiguous()
        values = self.arranged(name, weight).numpy()
        largest = float(np.abs(values).max(initial=0))
        limit = {Format.F16: FP16_MAX, Format.Q8_0: 127 * FP16_MAX}
        if not largest < limit.get(stored, math.inf):
            raise ModelError(f"{name}: {largest:g} is too large for {stored.name}. Export with --type bf16 or f32")
        return values if stored == Format.F32 else gguf.quants.quantize(values, stored)

    def arranged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Order the outputs of a linear, the rows of `weight`, as llama.cpp does."""
        config, linear = self._weights.config, name.rpartition(".")[0].rpartition(".")[2]
        if linear == self._layout.by_head:
            split = weight.view(config["num_attention_heads"], 3, -1, *weight.shape[1:])
            return split.transpose(0, 1).reshape(weight.shape).contiguous()
        if (counted_by := self._layout.interleaved.get(linear)) is None:
            return weight
        heads = config.get(counted_by) or config["num_attention_heads"]
        return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()

    def _is_transposed(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._weights.transposed
