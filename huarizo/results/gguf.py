"""A tuned Llama as one GGUF file, which llama.cpp and Ollama run: written tensor by tensor with the `gguf` package.

What has gone wrong elsewhere is decided here in words or not at all: the tokenizer's kind and pre-tokenizer, the order
of the rotated halves of q and k, whether a BOS is added, the chat template, and the token at which an answer ends.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from rich.console import Console

from huarizo.console import tracked
from huarizo.data.prompts import OpenExchange
from huarizo.data.tokens import Encoder
from huarizo.errors import ModelError, UserError
from huarizo.files import make_parent, require_space, told, whole_file
from huarizo.model.adapter import check_adapter
from huarizo.model.merged import MergedWeights
from huarizo.results.target import check_file
from huarizo.results.tuned import Tuned

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # a weight
LLAMA3_SPLIT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
"""How the pattern of Llama 3's pre-tokenizer begins."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF has it. `scores` are SentencePiece's, `merges` byte-level BPE's."""

    kind: Literal["llama", "gpt2"]
    pre: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None


def export_gguf(tuned: Tuned, target: Path, kind: str, force: bool = False, console: Console | None = None) -> Path:
    """Write a tuned model as a GGUF file, which appears whole or not at all. kind: one of `TYPES`.

    Raises:
        UserError: a type that is not written, or there is something at `target` already, and not `force`.
        ModelError: a tokenizer or rope that llama.cpp does not have, or an adapter that does not fit the base.
        MachineError: no space on the disk, or it can't be written.
    """
    if kind not in TYPES:
        raise UserError(
            f"--type {kind}: {', '.join(TYPES)} can be written. K-quants are llama.cpp's own, made from an f16 file: "
            "llama-quantize MODEL-f16.gguf MODEL-Q4_K_M.gguf Q4_K_M"
        )
    check_file(target, force)
    weights = MergedWeights(tuned.base, tuned.adapter)
    require_space(target, size_of(weights, kind), "the GGUF file")
    make_parent(target)
    with whole_file(target) as temporary:
        write_gguf(weights, tuned.encoder, tuned.base, temporary, kind, console)
    return target


def size_of(weights: MergedWeights, kind: str) -> int:
    """Bytes that a GGUF file takes at most, tokenizer included."""
    values = sum(math.prod(weights.shape(name)) for name in weights.names())
    return int(values * BYTES[kind]) + 20_000_000


def export_adapter(tuned: Tuned, target: Path, force: bool = False) -> Path:
    """Write the adapter alone as GGUF (F32), to be put on a GGUF of its base: a few megabytes.

    Raises:
        UserError: there is something at `target` already, and not `force`.
        ModelError: an adapter that is more than A and B of one rank and scale; merge it instead.
        MachineError: no space on the disk, or it can't be written.
    """
    check_file(target, force)
    weights = MergedWeights(tuned.base, tuned.adapter)
    lora = check_adapter(tuned.adapter)
    plain = not (lora.use_dora or lora.rank_pattern or lora.alpha_pattern or isinstance(lora.init_lora_weights, str))
    linear = all(set(parts) == {"lora_A.weight", "lora_B.weight"} for parts in weights.changes.values())
    if not plain or not linear or weights.replaced:
        raise ModelError(
            f"{tuned.adapter}: only a LoRA of one rank and scale on linear layers can be written alone (no DoRA, "
            "PiSSA, OLoRA, patterns or replaced layers). Export the merged model: leave out --adapter"
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, weights.config["num_hidden_layers"])
    make_parent(target)
    with whole_file(target) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora.lora_alpha * (math.sqrt(lora.r) if lora.use_rslora else 1))
        for module, parts in weights.changes.items():
            name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            b = _arranged(f"{module}.weight", parts["lora_B.weight"].float(), weights.config)
            writer.add_tensor(f"{name}.lora_a", parts["lora_A.weight"].float().contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


def write_gguf(
    weights: MergedWeights,
    encoder: Encoder,
    tokenizer_folder: Path,
    target: Path,
    kind: str,
    console: Console | None = None,
) -> None:
    """Write the model into a file, which the caller makes whole.

    encoder: of the run's prompt format; its stop token becomes the end of an answer.
    tokenizer_folder: with tokenizer.json or tokenizer.model.
    console: a terminal to show on how many tensors are written.

    Raises:
        ModelError: a tokenizer or rope that llama.cpp does not have.
        MachineError: the disk is full or can't be written.
    """
    config = weights.config
    vocabulary = read_vocabulary(tokenizer_folder, encoder.tokenizer, config["vocab_size"])
    with told(target):
        writer = gguf.GGUFWriter(target, "llama")
        _describe(writer, config, kind, target.stem)
        rope = _rope_factors(writer, config)
        _add_vocabulary(writer, vocabulary, encoder)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
        plan = {name: _stored_as(name, weights, kind) for name in weights.names()}
        if rope is not None:
            writer.add_tensor_info("rope_freqs.weight", rope.shape, rope.dtype, rope.nbytes)
        for name, stored in plan.items():
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise ModelError(f"{weights.base}: llama.cpp's Llama has no tensor {name}")
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
            writer.write_tensor_data(_stored(_arranged(name, weights[name], config).numpy(), stored))
        writer.close()


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], kind: str, name: str) -> None:
    heads = config["num_attention_heads"]
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope_factors(writer: gguf.GGUFWriter, config: dict[str, Any]) -> np.ndarray | None:
    """Write what the rotation is; Llama 3's stretching is a factor for each frequency: float32 [head_size / 2]."""
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
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    stretched = 1 / ((1 - smooth) / rope["factor"] + smooth)
    original = rope["original_max_position_embeddings"]
    factors = np.where(wavelengths > original / low, rope["factor"], stretched)
    return np.where(wavelengths < original / high, 1.0, factors).astype(np.float32)


def _stored_as(name: str, weights: MergedWeights, kind: str) -> gguf.GGMLQuantizationType:
    """Vectors stay in fp32, as llama.cpp expects; so do rows that do not divide into Q8_0's blocks, in F16."""
    shape = weights.shape(name)
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
        return gguf.GGMLQuantizationType.F16
    return TYPES[kind][0]


def _stored(values: np.ndarray, stored: gguf.GGMLQuantizationType) -> np.ndarray:
    return values if stored == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, stored)


def _arranged(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """q and k with each head's two halves interleaved: llama.cpp rotates neighbours, Transformers halves."""
    heads = config["num_attention_heads"]
    if ".q_proj." not in name and ".k_proj." not in name:
        return weight
    heads = heads if ".q_proj." in name else config.get("num_key_value_heads") or heads
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()


def read_vocabulary(folder: Path, tokenizer: Any, size: int) -> Vocabulary:
    """The tokenizer of a model, SentencePiece or byte-level BPE, with as many tokens as the embedding has rows.

    Raises:
        ModelError: a tokenizer of another kind, or one whose pre-tokenizer llama.cpp does not have.
    """
    if not (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = spec["model"], {token["id"]: token for token in spec["added_tokens"]}
    if model["type"] != "BPE":
        raise ModelError(f"{folder}: a tokenizer of the kind {model['type']} can't be written as GGUF")
    ids = {number: text for text, number in model["vocab"].items()} | {n: t["content"] for n, t in added.items()}
    is_sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = [], []
    for number in range(size):
        text = ids.get(number, f"[PAD{number}]")
        tokens.append(text.encode("utf-8"))
        types.append(_type(number, text, added, is_sentencepiece, model, number in ids))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    if is_sentencepiece:
        ranks = {merge.replace(" ", ""): float(-rank) for rank, merge in reversed(list(enumerate(merges)))}
        scores = [ranks.get(token.decode("utf-8"), float(-len(merges) - 1)) for token in tokens]
        return Vocabulary("llama", "default", tokens, types, scores, None)
    return Vocabulary("gpt2", _pre_tokenizer(folder, spec), tokens, types, None, merges)


def _type(number: int, text: str, added: dict[int, Any], is_sentencepiece: bool, model: Any, known: bool) -> int:
    if not known:
        return gguf.TokenType.UNUSED
    if is_sentencepiece and text == model.get("unk_token"):
        return gguf.TokenType.UNKNOWN
    if number in added:
        return gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
    if is_sentencepiece and len(text) == 6 and text.startswith("<0x"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _pre_tokenizer(folder: Path, spec: dict[str, Any]) -> str:
    """llama.cpp's name of how a text is split before BPE, from what the tokenizer does."""
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not spec.get("normalizer"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex", "") if kinds[:1] == ["Split"] else ""
    if kinds == ["Split", "ByteLevel"] and pattern.startswith(LLAMA3_SPLIT):
        return "llama-bpe"
    raise ModelError(f"{folder}: llama.cpp's name of this tokenizer's pre-tokenizer is not known ({kinds})")


def leading_space(encoder: Encoder) -> str:
    """What a chat prompt has to begin with in llama.cpp so that SentencePiece cuts it as Transformers does: " " or "".

    llama.cpp puts a space in front of a text and behind every special token, or nowhere. Newer tokenizers put one in
    front of the whole text alone; for them it is told nowhere, and the prompt brings the one space along.
    """
    spec = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    steps = spec.get("pre_tokenizer") or {}
    schemes = [step.get("prepend_scheme") for step in steps.get("pretokenizers", [steps])]
    if encoder.prompt.name != "chat" or not spec["model"].get("byte_fallback") or "first" not in schemes:
        return ""
    text = encoder.prompt.pieces("", [OpenExchange("Hi")])[0].text
    specials = [token["content"] for token in spec["added_tokens"] if token["special"]]
    return "" if text.startswith(tuple(specials)) else " "


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    stop = encoder.stop_id if encoder.stop_id is not None else tokenizer.eos_token_id
    if stop is None:
        raise UserError("the tokenizer has no token that ends an answer, so a model in GGUF would never stop")
    writer.add_eos_token_id(stop)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(encoder.adds_bos)
    writer.add_add_eos_token(False)
    space = leading_space(encoder)
    if vocabulary.kind == "llama":
        writer.add_add_space_prefix(not space)
    if isinstance(tokenizer.chat_template, str) and encoder.prompt.name == "chat":
        writer.add_chat_template(("{{- ' ' }}" if space else "") + tokenizer.chat_template)
