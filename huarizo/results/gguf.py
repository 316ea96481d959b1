"""Writes a tuned model as one GGUF file for llama.cpp and Ollama, tensor by tensor, with the `gguf` package.

Everything that changes the model's answers is written explicitly, or the export fails: the tokenizer's kind and
pre-tokenizer, the order of the rotated halves of q and k, the BOS, the chat template and the stop tokens.
"""

import errno
import math
import os
from pathlib import Path

import gguf
import numpy as np
from rich.console import Console

from huarizo.console import tracked
from huarizo.data.tokens import Encoder
from huarizo.errors import ModelError, UserError
from huarizo.files import make_parent, require_space, whole_file
from huarizo.inference.artifact import Tuned
from huarizo.model.adapter import check_adapter
from huarizo.model.architectures.architecture import GgufLayout
from huarizo.model.merge import MergedWeights
from huarizo.model.skeleton import configuration
from huarizo.results.gguf_settings import Settings
from huarizo.results.gguf_tensors import Tensors
from huarizo.results.overwrite import check_file
from huarizo.results.vocabulary import add_vocabulary, read_vocabulary

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
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
    settings_of(weights)
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


def settings_of(weights: MergedWeights) -> Settings:
    """A model's configuration for llama.cpp.

    Raises:
        ModelError: llama.cpp does not compute it.
    """
    return Settings(layout_of(weights), configuration(weights.config), weights.base)


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
    settings = settings_of(weights)
    tensors = Tensors(weights, settings.layout, TYPES["f32"][0])
    make_parent(target)
    with whole_file(target) as temporary:
        writer = gguf.GGUFWriter(temporary, settings.layout.name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora.lora_alpha * (math.sqrt(lora.r) if lora.use_rslora else 1))
        for module, parts in weights.changes.items():
            name = tensors.name_of(f"{module}.weight")
            b = tensors.arranged(f"{module}.weight", parts["lora_B.weight"].float())
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
    config, settings = weights.config, settings_of(weights)
    tensors = Tensors(weights, settings.layout, TYPES[kind][0])
    vocabulary = read_vocabulary(weights.base, encoder.tokenizer, config["vocab_size"])
    writer = gguf.GGUFWriter(target, settings.layout.name)
    writer.add_name(name)
    settings.write(writer)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    extra = settings.write_rope(writer)
    add_vocabulary(writer, vocabulary, encoder)
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for name, gguf_name in tensors.names.items():
        shape, stored = tensors.shape(name), tensors.format(name)
        size = int(np.prod(shape)) * gguf.GGML_QUANT_SIZES[stored][1] // gguf.GGML_QUANT_SIZES[stored][0]
        dtype = np.dtype(np.float16) if stored == gguf.GGMLQuantizationType.F16 else np.dtype(np.float32)
        writer.add_tensor_info(gguf_name, shape, dtype, size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values)
    for name in tracked(tensors.names, "writing", console):
        writer.write_tensor_data(tensors[name])
    _close(writer, target)


def _close(writer: gguf.GGUFWriter, file: Path) -> None:
    """Close a file and check its size, because numpy, which writes the tensors, does not report the last failure."""
    assert writer.fout is not None
    size = writer.fout[0].tell()
    writer.close()
    if file.stat().st_size < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
