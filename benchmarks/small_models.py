"""Small models with random weights of any causal type of Transformers, and what Huarizo computes in them beside it.

Sizes are made small by the names that they have in configurations; `FITTING` has what else a type needs to be small.
Used by `model_types.py` and by tests.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from huarizo.data.packing import num_labels
from huarizo.data.padding import pad
from huarizo.data.tokens import IGNORED, Example
from huarizo.model.batching import check_batching, losses_of, planned_batching, require_gradients
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.load import load_base, read_config
from huarizo.model.lora import add_lora, check_lora
from huarizo.model.targets import with_targets
from huarizo.plan import Batching
from huarizo.recipe import make_recipe

VOCABULARY = 97


def named(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, int] = {
    **named(VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    **named(64, "hidden_size d_model n_embd embedding_dim word_embed_proj_dim attention_hidden_size lru_width"),
    **named(
        96,
        "intermediate_size ffn_dim n_inner dff dim_ff d_inner ffn_hidden_size intermediate_size_mlp "
        "dense_intermediate_size decoder_ffn_dim",
    ),
    **named(
        32,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size "
        "linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head kv_lora_rank q_lora_rank o_lora_rank "
        "mamba_head_dim mamba_headdim index_head_dim hidden_size_per_layer_input ple_embed_dim hc_lowrank "
        "attention_head_dim",
    ),
    **named(
        16,
        "head_dim v_head_dim qk_nope_head_dim swa_head_dim kv_channels dim_head d_head laurel_rank time_step_rank "
        "mamba_dt_rank adapter_rank gated_norm_rank global_head_dim",
    ),
    **named(8, "qk_rope_head_dim rotary_dim state_size ssm_state_size mamba_d_state d_rel"),
    **named(
        8,
        "sliding_window window_size local_attention attention_window_size sliding_window_size chunk_size "
        "mamba_chunk_size attention_chunk_size block_size index_topk keep_window_size",
    ),
    **named(2, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks num_layers_per_stack"),
    **named(
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads linear_num_heads "
        "linear_num_value_heads mamba_n_heads mamba_num_heads swa_num_attention_heads",
    ),
    **named(16, "index_n_heads"),  # so many that no two tokens have the same score
    **named(2, "num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads num_query_groups"),
    **named(4, "num_experts n_routed_experts num_local_experts moe_num_experts num_experts_per_layer"),
    **named(
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group topk_group num_expert_group "
        "zero_expert_num n_groups",
    ),
    **named(1, "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers"),
    **named(512, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    **named(0, "pad_token_id num_nextn_predict_layers num_kv_shared_layers"),
    **named(1, "bos_token_id decoder_start_token_id"),
    **named(2, "eos_token_id"),
}  # fmt: skip
"""Names of numbers in configurations -> a small one."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LATENT = "axk1", "axk2", "bailing_hybrid", "deepseek_v3", "kimi_linear", "longcat_flash", "minicpm3", "youtu"
"""Types with keys and values made from a few channels whose `head_dim` is that of rope."""
FITTING: dict[str, dict[str, Any]] = {
    **{kind: {"head_dim": 8} for kind in LATENT},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "head_dim": 64,
        "o_groups": 4,
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 24, "per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "fuyu": {
        "text_config": {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
    },
    "gemma3n_text": {"intermediate_size": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 32},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "rwkv": {"rescale_every": 0},  # in float16 only; by default it changes the weights between training and answering
    "xlstm": {"chunk_size": 64},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 4, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs beside or instead of SMALL."""

KINDS = "layer_types", "layers_block_type", "mlp_layer_types", "block_types"
"""Names of lists with the kind of each layer."""


def small_config(model_type: str, **more: Any) -> PretrainedConfig:
    """A configuration of two layers, or of as many as there are kinds of layers, whose windows reach eight tokens.

    Raises:
        Exception: of any kind, where these sizes don't fit the type.
    """
    kind = CONFIG_MAPPING[model_type]
    default = kind().to_dict()
    values = {name: SMALL[name] for name, value in default.items() if name in SMALL and type(value) is int}
    values |= {"initializer_range": 0.1}
    if "kv_lora_rank" in values:  # keys and values of all heads are made from a few channels
        values["num_key_value_heads"] = values["num_attention_heads"]
    kinds = {name: list(dict.fromkeys(default[name])) for name in KINDS if isinstance(default.get(name), list)}
    count = max([2, *map(len, kinds.values())])
    values |= {name: count for name in values if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")}
    values |= {name: (found * count)[:count] for name, found in kinds.items()}
    return kind(**values | FITTING.get(model_type, {}) | more)


def save_small(config: PretrainedConfig, folder: Path) -> Path:
    """Write a model folder in fp32. Every weight is random, also norms and biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any() or not parameter.isfinite().all():
            mean = parameter.nan_to_num(0, 0, 0).mean().item()
            nn.init.normal_(parameter, mean, 0.1)
    model.save_pretrained(folder)
    return folder


def random_rows(lengths: Iterable[int], learnt_from: int = 4) -> list[Example]:
    """Rows of random tokens, learnt from this place on."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Example(row, [IGNORED] * learnt_from + row[learnt_from:]) for row in rows]


Gradients = dict[str, torch.Tensor]
EXAMPLES = random_rows((30, 9, 27))
BUDGET = 64  # tokens of a batch


@dataclass(frozen=True)
class Trained:
    """A model as Huarizo trains it, with what it computes of EXAMPLES."""

    model: Any
    batching: Batching
    faults: list[str]
    loss: float
    gradients: Gradients


def seeded(model: Any) -> Any:
    """The same numbers in every adapter of these shapes."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def trained(folder: Path, targets: list[str] | str | None = None, precision: str = "fp32") -> Trained:
    """Load a model folder, add LoRA and compute loss and gradients in fp32, all as a run does.

    targets: as `lora.target_modules`; by default what Huarizo takes for the model.
    precision: of the base: fp32, or int8 for a model that doesn't pack, calibrated on EXAMPLES.
    """
    config = read_config(folder)
    lora = make_recipe(lora={"dropout": 0, **({} if targets is None else {"target_modules": targets})}).lora
    lora = with_targets(lora, config)
    check_lora(folder, lora, precision)
    where = torch.float32, torch.device("cpu")
    base = (
        load_base(folder, *where)
        if precision == "fp32"
        else load_quantised_base(folder, precision, *where, pad(EXAMPLES))
    )
    model = seeded(add_lora(base, lora, 1)).train()
    checked = check_batching(model, planned_batching(config)[0], EXAMPLES)
    require_gradients(model, checked.batching, EXAMPLES)
    losses, total = losses_of(model.get_base_model(), checked.batching), 0.0
    for batch in losses.within(BUDGET, EXAMPLES, None):
        loss = losses(model, batch) / num_labels(EXAMPLES)
        loss.backward()
        total += loss.item()
    return Trained(model, checked.batching, checked.faults, total, gradients_of(model))


def stock(folder: Path, lora: LoraConfig) -> tuple[float, Gradients]:
    """Loss and gradients of EXAMPLES by Transformers and PEFT alone, row by row, without dropout."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.config.get_text_config().use_cache = False
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules,
        fan_in_fan_out=lora.fan_in_fan_out,
    )  # fmt: skip
    model, total = seeded(get_peft_model(base, config)).eval(), 0.0
    for example in EXAMPLES:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].float()
        targets = torch.tensor(example.labels[1:])
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / num_labels(EXAMPLES)
        loss.backward()
        total += loss.item()
    return total, gradients_of(model)


def gradients_of(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(ours: Gradients, theirs: Gradients) -> float:
    """Of all gradients at once, relative to their size; infinite where not the same weights have one."""
    if ours.keys() != theirs.keys():
        return float("inf")
    ours_N, theirs_N = (
        torch.cat([found[name].flatten().double() for name in sorted(found)]) for found in (ours, theirs)
    )
    return float((ours_N - theirs_N).norm() / theirs_N.norm())
