"""Writes a tuned model as one GGUF file for llama.cpp and Ollama, tensor by tensor, with the `gguf` package.

Everything that changes the model's answers is written explicitly, or the export fails: the tokenizer's kind and
pre-tokenizer, the order of the rotated halves of q and k, the BOS, the chat template and the stop tokens.
"""

import errno
import math
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from rich.console import Console

from huarizo.console import tracked
from huarizo.data.tokens import Encoder
from huarizo.errors import ModelError, UserError
from huarizo.files import make_parent, require_space, whole_file
from huarizo.inference.artifact import Tuned
from huarizo.model.adapter import check_adapter
from huarizo.model.architectures.architecture import GgufLayout
from huarizo.model.merge import MergedWeights
from huarizo.results.overwrite import check_file
from huarizo.results.vocabulary import add_vocabulary, read_vocabulary

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
FP16_MAX = 65504
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # a weight


def export_gguf(tuned: Tuned, target: Path, kind: str, force: bool = False, console: Console | None = None) -> Path:
    """Write a tuned model as a GGUF file, whole or not at all. kind: one of `TYPES`.

    Raises:
        UserError: an unknown type, or `target` exists and `force` is not set.
        ModelError: llama.cpp does not support the tokenizer or rope, or the adapter does not fit the base.
        MachineError: no space on the disk, or it is not writable.
    """
    if kind not in TYPES:
        raise UserError(
            f"--type {kind}: it must be one of {', '.join(TYPES)}. llama.cpp makes K-quants from an f16 file: "
            "llama-quantize MODEL-f16.gguf MODEL-Q4_K_M.gguf Q4_K_M"
        )
    check_file(target, force, [tuned.base, tuned.adapter])
    weights = MergedWeights(tuned.base, tuned.adapter)
    layout_of(weights)
    require_space(target, size_of(weights, kind), "the GGUF file")
    make_parent(target)
    with whole_file(target) as temporary:
        write_gguf(weights, tuned.encoder, temporary, kind, target.stem, console)
    return target


def layout_of(weights: MergedWeights) -> GgufLayout:
    """How llama.cpp names and lays out a model's architecture.

    Raises:
        ModelError: the architecture has no such layout here.
    """
    layout = weights.architecture.gguf
    if layout is None:
        raise ModelError(
            f"{weights.base}: {weights.architecture.model_type} models can't be written as GGUF here. `huarizo merge` "
            "writes an ordinary model folder, which the converter of llama.cpp (convert_hf_to_gguf.py) may take"
        )
    return layout


def _tensor_names(weights: MergedWeights) -> gguf.TensorNameMap:
    """llama.cpp's names of the model's tensors."""
    named = layout_of(weights).name
    known = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == named)
    return gguf.get_tensor_name_map(known, weights.config["num_hidden_layers"])


def is_adapter(file: Path) -> bool:
    """Whether a GGUF file contains only an adapter.

    Raises:
        ModelError: it is not a complete GGUF file.
    """
    try:
        field = gguf.GGUFReader(file).get_field("general.type")
        return field is not None and field.contents() == "adapter"
    except Exception as error:  # a damaged file can raise anything
        raise ModelError(f"{file}: not a complete GGUF file ({error}). Export it again, or remove it") from None


def size_of(weights: MergedWeights, kind: str) -> int:
    """Upper bound of a GGUF file's size in bytes, including the tokenizer."""
    values = sum(math.prod(weights.shape(name)) for name in weights.names())
    return int(values * BYTES[kind]) + 20_000_000


def export_adapter(tuned: Tuned, target: Path, force: bool = False) -> Path:
    """Write only the adapter as GGUF (F32), for use with a GGUF of its base: a few megabytes.

    Raises:
        UserError: `target` exists and `force` is not set.
        ModelError: the adapter is more than A and B of one rank and scale, so it must be merged.
        MachineError: no space on the disk, or it is not writable.
    """
    check_file(target, force, [tuned.base, tuned.adapter])
    weights = MergedWeights(tuned.base, tuned.adapter)
    if weights.tied and weights.structure.head in weights.changes:
        raise ModelError(
            f"{tuned.adapter}: it changes the head, which this base shares with the embedding, so GGUF has no tensor "
            "for it. Export the merged model: leave out --adapter"
        )
    lora = check_adapter(tuned.adapter)
    plain = not (lora.use_dora or lora.rank_pattern or lora.alpha_pattern or isinstance(lora.init_lora_weights, str))
    linear = all(set(parts) == {"lora_A.weight", "lora_B.weight"} for parts in weights.changes.values())
    if not plain or not linear or weights.replaced or weights.token_rows or weights.base_tensors:
        raise ModelError(
            f"{tuned.adapter}: only a LoRA of one rank and scale on linear layers can be written alone (no DoRA, "
            "PiSSA, OLoRA, patterns, replaced layers or added tokens). Export the merged model: leave out --adapter"
        )
    layout, names = layout_of(weights), _tensor_names(weights)
    make_parent(target)
    with whole_file(target) as temporary:
        writer = gguf.GGUFWriter(temporary, layout.name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora.lora_alpha * (math.sqrt(lora.r) if lora.use_rslora else 1))
        for module, parts in weights.changes.items():
            name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            b = _arranged(f"{module}.weight", parts["lora_B.weight"].float(), weights)
            writer.add_tensor(f"{name}.lora_a", parts["lora_A.weight"].float().contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        _close(writer, temporary)
    return target


def write_gguf(
    weights: MergedWeights,
    encoder: Encoder,
    target: Path,
    kind: str,
    name: str,
    console: Console | None = None,
) -> None:
    """Write the model to `target`, which the caller moves into place once complete.

    encoder: of the run's prompt format. Its stop token ends an answer.
    name: the model's name in llama.cpp.
    console: a terminal to show progress on.

    Raises:
        ModelError: llama.cpp does not support the tokenizer, activation or rope, or the type can't hold the weights.
        OSError: the disk is full or not writable.
    """
    config, layout = weights.config, layout_of(weights)
    vocabulary = read_vocabulary(weights.base, encoder.tokenizer, config["vocab_size"], layout.splits)
    writer = gguf.GGUFWriter(target, layout.name)
    _describe(writer, weights, kind, name)
    rope = _rope_factors(writer, config)
    add_vocabulary(writer, vocabulary, encoder)
    names = _tensor_names(weights)
    plan = {name: _stored_as(name, weights, kind) for name in weights.names()}
    if rope is not None:
        writer.add_tensor_info("rope_freqs.weight", rope.shape, rope.dtype, rope.nbytes)
    for name, stored in plan.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(f"{weights.base}: llama.cpp's {layout.name} has no tensor {name}")
        shape = weights.shape(name)
        size = int(np.prod(shape)) * gguf.GGML_QUANT_SIZES[stored][1] // gguf.GGML_QUANT_SIZES[stored][0]
        dtype = np.dtype(np.float16) if stored == gguf.GGMLQuantizationType.F16 else np.dtype(np.float32)
        writer.add_tensor_info(gguf_name, shape, dtype, size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope is not None:
        writer.write_tensor_data(rope)
    for name, stored in tracked(plan.items(), "writing", console):
        writer.write_tensor_data(_stored(name, _arranged(name, weights[name], weights), stored))
    _close(writer, target)


def _close(writer: gguf.GGUFWriter, file: Path) -> None:
    """Close a file and check its size, because numpy, which writes the tensors, does not report the last failure."""
    assert writer.fout is not None
    size = writer.fout[0].tell()
    writer.close()
    if file.stat().st_size < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def _describe(writer: gguf.GGUFWriter, weights: MergedWeights, kind: str, name: str) -> None:
    config, layout = weights.config, layout_of(weights)
    if config.get("hidden_act", layout.activation) != layout.activation:
        raise ModelError(
            f"{weights.base}: llama.cpp's {layout.name} has the activation {layout.activation}, not "
            f"{config['hidden_act']}"
        )
    heads = config["num_attention_heads"]
    writer.add_name(name)
    writer.add_context_length(_positions(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))  # the default of Transformers
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _positions(config: dict[str, Any]) -> int:
    return config.get("max_position_embeddings", 2048)  # the default of Transformers


def _head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope_factors(writer: gguf.GGUFWriter, config: dict[str, Any]) -> np.ndarray | None:
    """Write rope's settings. Returns Llama 3's factor for each frequency: float32 [head_size / 2]; None for others."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    writer.add_rope_freq_base(theta)
    if kind == "default":
        return None
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
        return None
    if kind != "llama3":
        raise ModelError(f"rope scaling {kind!r} can't be written as GGUF here: default, linear and llama3 can")
    size = _head_size(config)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope.get("original_max_position_embeddings") or _positions(config)
    smooth = (original / wavelengths - low) / (high - low)
    stretched = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = np.where(wavelengths > original / low, rope["factor"], stretched)
    return np.where(wavelengths < original / high, 1.0, factors).astype(np.float32)


def _stored_as(name: str, weights: MergedWeights, kind: str) -> gguf.GGMLQuantizationType:
    """Vectors are stored in F32, as llama.cpp expects, and rows that Q8_0's blocks do not divide in F16."""
    shape = weights.shape(name)
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
        return gguf.GGMLQuantizationType.F16
    return TYPES[kind][0]


def _stored(name: str, weight: torch.Tensor, stored: gguf.GGMLQuantizationType) -> np.ndarray:
    values = weight.numpy()
    largest = float(np.abs(values).max(initial=0))
    limit = {gguf.GGMLQuantizationType.F16: FP16_MAX, gguf.GGMLQuantizationType.Q8_0: 127 * FP16_MAX}
    if not largest < limit.get(stored, math.inf):
        raise ModelError(f"{name}: {largest:g} is too large for {stored.name}. Export with --type bf16 or f32")
    return values if stored == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, stored)


def _arranged(name: str, weight: torch.Tensor, weights: MergedWeights) -> torch.Tensor:
    """Interleave the two halves of each head of q and k: llama.cpp rotates neighbours, Transformers halves."""
    counted_by = layout_of(weights).interleaved.get(name.rpartition(".")[0].rpartition(".")[2])
    if counted_by is None:
        return weight
    heads = weights.config.get(counted_by) or weights.config["num_attention_heads"]
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()
