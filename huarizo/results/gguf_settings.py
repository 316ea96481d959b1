"""Writes into a GGUF file what llama.cpp must know of a model's configuration: sizes, norms, rope, windows, scales.

llama.cpp computes an architecture in one way. A configuration that asks for another one is an error that names the
field, before anything is written.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from huarizo.errors import ModelError
from huarizo.model.architectures.architecture import GgufLayout

LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""Types of layers, with a window and without."""
YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True}
"""The values of YaRN's fields that llama.cpp computes with."""


@dataclass(frozen=True)
class Settings:
    """A model's configuration for llama.cpp.

    layout: of its architecture. config: Transformers' configuration. source: the model's folder, for messages.

    Raises:
        ModelError: llama.cpp computes another model. The message names the field.
    """

    layout: GgufLayout
    config: Any
    source: Path

    def __post_init__(self) -> None:
        config, layout = self.config, self.layout
        activation = next(
            value for name in ("hidden_activation", "hidden_act", "activation_function") if (value := self._get(name))
        )
        if activation not in layout.activations:
            raise ModelError(
                f"{self.source}: llama.cpp's {layout.name} has the activation {layout.activations[0]}, not {activation}"
            )
        for name, values in layout.fixed.items():
            if (value := self._get(name)) not in values:
                raise self._refused(f"{name} is {value}, and llama.cpp computes with {values[0]}")
        if layout.check and (problem := layout.check(config)):
            raise self._refused(problem)
        if layout.windows:
            self._check_windows()
        if layout.ropes:
            self._check_rope()

    def _get(self, name: str, default: Any = None) -> Any:
        """A field that this type of model has; config.json may hold others, which Transformers passes over."""
        kind = type(self.config)
        return getattr(self.config, name) if hasattr(kind, name) or name in kind.attribute_map else default

    def _refused(self, problem: str) -> ModelError:
        return ModelError(
            f"{self.source / 'config.json'}: {problem} ({self.layout.name}), so GGUF can't express this model. "
            "`huarizo merge` writes an ordinary model folder"
        )

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self._get("head_dim") or self.config.hidden_size // self.config.num_attention_heads

    @property
    def rotated(self) -> int:
        """Channels of a head that rope rotates."""
        return int(self.head_size * self._rope().get("partial_rotary_factor", 1.0))

    @property
    def positions(self) -> int:
        """`max_position_embeddings`."""
        return self._get("max_position_embeddings", 2048)  # the default of Transformers

    @property
    def window(self) -> int | None:
        """Tokens that a layer with a window sees; None if there is no such layer."""
        types = self._get("layer_types")
        return self._get("sliding_window") if types is None or LOCAL in types else None

    def _period(self) -> int | None:
        """n where layer i has a window if i % n < n - 1, and 0 where all have one; None if there is no n."""
        has_window = [kind == LOCAL for kind in self.config.layer_types]
        for n in range(len(has_window) + 1):
            if has_window == [n == 0 or i % n < n - 1 for i in range(len(has_window))]:
                return n
        return None

    def _check_windows(self) -> None:
        if self._get("layer_types") is None:
            return
        if self._period() is None:
            raise self._refused("layer_types is no pattern of windows and one layer without, which llama.cpp repeats")
        if self.window is None and LOCAL in self.config.layer_types:
            raise self._refused("sliding_window is missing")

    def _rope(self, layer: str = GLOBAL) -> dict[str, Any]:
        """The settings of rope in a type of layers."""
        found = self._get("rope_parameters") or {}
        return found.get(layer) or found.get(LOCAL) or found

    def _check_rope(self) -> None:
        rope, local = self._rope(), self._rope(LOCAL)
        kinds = self.layout.ropes
        if rope["rope_type"] not in kinds:
            names = " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
            raise ModelError(f"rope scaling {rope['rope_type']!r} can't be written as GGUF here: {names} can")
        if rope["rope_type"] == "yarn":
            self._check_yarn(rope)
        if not self.layout.partial_rope and rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise self._refused("partial_rotary_factor is not 1")
        if LOCAL not in (self._get("rope_parameters") or {}) or self.window is None:
            return
        if local["rope_type"] != "default":
            raise self._refused(
                f"rope_parameters.{LOCAL}.rope_type is {local['rope_type']}, and llama.cpp's is default"
            )
        if not self.layout.local_theta and local["rope_theta"] != rope["rope_theta"]:
            raise self._refused(f"rope_parameters.{LOCAL}.rope_theta is not that of the other layers")

    def _check_yarn(self, rope: dict[str, Any]) -> None:
        attention = rope.get("attention_factor")
        computed = 0.1 * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
        if attention is not None and not math.isclose(attention, computed, rel_tol=1e-5):
            raise self._refused(f"rope_parameters.attention_factor is {attention:g}, and llama.cpp's is {computed:g}")
        for name, value in YARN.items():
            if rope.get(name) not in (None, value):
                raise self._refused(f"rope_parameters.{name} is {rope[name]}, and llama.cpp's is {value}")

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Write the settings, but for those of rope."""
        config, heads = self.config, self.config.num_attention_heads
        writer.add_context_length(self._context())
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(
            self._get("intermediate_size") or self._get("n_inner") or 4 * config.hidden_size  # the latter are GPT-2's
        )
        writer.add_head_count(heads)
        writer.add_head_count_kv(self._get("num_key_value_heads") or heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        if self.layout.ropes:
            writer.add_rope_dimension_count(self.rotated)
        for key, name in self.layout.numbers.items():
            value, key = self._get(name), f"{self.layout.name}.{key}"
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif value is not None:
                writer.add_float32(key, value)
        if self.layout.windows and self.window is not None:
            writer.add_sliding_window(self.window)
            writer.add_sliding_window_pattern(self._period() or 0)

    def _context(self) -> int:
        """The longest text. Without windows in llama.cpp, it is one that none of the model's windows cuts."""
        window = None if self.layout.windows else self.window
        return self.positions if window is None else min(self.positions, window)

    def write_rope(self, writer: gguf.GGUFWriter) -> dict[str, np.ndarray]:
        """Write the settings of rope. Returns tensors that belong to them: float32 [rotated / 2] by name."""
        if not self.layout.ropes:
            return {}
        rope = self._rope()
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        if self.layout.local_theta and self.window is not None:
            writer.add_rope_freq_base_swa(float(self._rope(LOCAL)["rope_theta"]))
        kind = rope["rope_type"]
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or self.positions)
        return {"rope_freqs.weight": self._llama3_factors(rope)} if kind == "llama3" else {}

    def _llama3_factors(self, rope: dict[str, Any]) -> np.ndarray:
        """Llama 3's factor for each frequency: float32 [rotated / 2]."""
        size, theta = self.rotated, float(rope["rope_theta"])
        wavelengths = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        original = rope.get("original_max_position_embeddings") or self.positions
        smooth = (original / wavelengths - low) / (high - low)
        stretched = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors = np.where(wavelengths > original / low, rope["factor"], stretched)
        return np.where(wavelengths < original / high, 1.0, factors).astype(np.float32)
