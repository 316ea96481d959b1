"""A merged model is the base with its adapter: every kind of LoRA, tied heads, and the base's own dtype."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from huarizo.errors import ModelError
from huarizo.model.adapter import load_adapter
from huarizo.model.lora import add_lora
from huarizo.model.merge import MergedWeights, merged_shards
from huarizo.recipe import make_recipe
from tests.tiny import make_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}, "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"}, "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
}  # fmt: skip


def make_pair(
    folder: Path, options: dict[str, Any], targets: list[str], dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[Path, Path]:
    """A base and an adapter on it with random weights."""
    base, adapter = folder / "base", folder / "adapter"
    model = make_model(**config).to(dtype)
    model.save_pretrained(base, max_shard_size="60KB")
    recipe = make_recipe(lora={"r": 4, "target_modules": targets, "options": options})
    tuned = add_lora(model.requires_grad_(False), recipe.lora, 0)
    for name, parameter in tuned.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.peft_config["default"].base_model_name_or_path = "owner/the-base"
    tuned.save_pretrained(str(adapter), save_embedding_layers=False)
    return base, adapter


def change_config(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def written(weights: MergedWeights, folder: Path) -> Path:
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for _, part in merged_shards(weights):
        tensors |= part
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(weights.config))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_logits_are_those_of_base_and_adapter(tmp_path: Path, kind: str, tied: bool) -> None:
    targets = ["q_proj", "down_proj"] + (["lm_head"] if not (tied and "init_lora_weights" in KINDS[kind]) else [])
    base, adapter = make_pair(tmp_path, KINDS[kind], targets, tie_word_embeddings=tied)
    ids = torch.randint(0, 260, (1, 20))
    with torch.no_grad():
        expected = load_adapter(LlamaForCausalLM.from_pretrained(base), adapter)(ids).logits
        plain = LlamaForCausalLM.from_pretrained(base)(ids).logits
        merged = written(MergedWeights(base, adapter), tmp_path / "merged")
        actual = LlamaForCausalLM.from_pretrained(merged)(ids).logits
    assert float((actual - expected).abs().max()) < 1e-5 < float((plain - expected).abs().max())


def test_a_tied_head_that_is_kept_all_the_same_is_the_embedding(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, {}, ["q_proj", "lm_head"], tie_word_embeddings=True)
    (shard,) = [file for file in base.glob("*.safetensors") if EMBEDDING in load_file(file)]
    tensors = load_file(shard)
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, shard, metadata={"format": "pt"})
    index = base / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"][HEAD] = shard.name
    index.write_text(json.dumps(listed))
    weights = MergedWeights(base, None)
    assert weights.tied and HEAD not in weights.names() and weights.dtype(HEAD) == torch.float32
    assert MergedWeights(base, adapter).names().count(HEAD) == 1  # the adapter changes one of the two


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["pattern", "embedding", "head", "layers", "modules_to_save"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_peft_itself_saved_is_merged(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model(tie_word_embeddings=tied).save_pretrained(base)
    tuned = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=4, task_type="CAUSAL_LM", ensure_weight_tying=False, **options),
    )
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(str(adapter))
    ids = torch.randint(0, 260, (1, 20))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter)).eval()(ids).logits
        loaded = load_adapter(LlamaForCausalLM.from_pretrained(base), adapter)(ids).logits
        merged = written(MergedWeights(base, adapter), tmp_path / "merged")
        actual = LlamaForCausalLM.from_pretrained(merged)(ids).logits
    assert torch.equal(loaded, expected) and float((actual - expected).abs().max()) < 1e-5


def test_lora_on_biases_is_refused_in_words(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make_model(attention_bias=True)
    model.save_pretrained(base)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True)
    get_peft_model(model, lora).save_pretrained(str(adapter))
    with pytest.raises(ModelError, match="lora_bias can't be merged"):
        MergedWeights(base, adapter)


def test_a_replaced_embedding_of_another_size_is_of_another_base(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, {}, ["q_proj"])
    file = adapter / "adapter_model.safetensors"
    whole = "base_model.model.model.embed_tokens.weight"
    save_file(load_file(file) | {whole: torch.zeros(300, 64)}, file)
    for values in ({}, {"modules_to_save": ["embed_tokens"]}):
        change_config(adapter, **values)
        told = r"adapter_model.safetensors: it has rows for 300 tokens, the base for 260, and there is no tokenizer"
        with pytest.raises(ModelError, match=told):
            MergedWeights(base, adapter)
    save_file(load_file(file) | {whole: torch.zeros(200, 64)}, file)
    with pytest.raises(
        ModelError, match=r"not for .*: its model.embed_tokens.weight is \d+ x 64, the adapter's 200 x 64"
    ):
        MergedWeights(base, adapter)


def test_the_bases_dtype_is_kept_and_added_to_in_fp32(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, {}, ["q_proj"], dtype=torch.bfloat16)
    weights = MergedWeights(base, adapter)
    parts = {k: t for _, tensors in merged_shards(weights) for k, t in tensors.items()}
    assert {tensor.dtype for tensor in parts.values()} == {torch.bfloat16}
    module = "model.layers.0.self_attn.q_proj"
    lora = load_file(adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{module}.lora_{part}.weight"].float() for part in "AB")
    before = MergedWeights(base, None)[f"{module}.weight"]
    assert torch.equal(parts[f"{module}.weight"], (before + 16 / 4 * (b @ a)).bfloat16())
    assert len(weights.shards) > 1 and sorted(parts) == sorted(weights.names())


def test_a_weight_that_its_dtype_can_not_hold_is_reported(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, {}, ["q_proj"], dtype=torch.float16)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1000 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"q_proj.weight is too large for torch.float16"):
        written(MergedWeights(base, adapter), tmp_path / "merged")


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "lora_B.weight of .* is missing"),
        ({"use_dora": True}, lambda t: {k: v for k, v in t.items() if "magnitude" not in k}, "magnitude.* is missing"),
        (
            {},
            lambda t: {k.replace("A.weight", "A.default.weight"): v for k, v in t.items()},
            "A.* is (not expected|mis)",
        ),
        ({}, lambda t: {k: v * math.nan for k, v in t.items()}, "not finite"),
    ],
    ids=["no B", "no magnitude", "other names", "nan"],
)
def test_a_damaged_adapter_is_reported_before_anything_is_merged(
    tmp_path: Path, options: dict[str, Any], change: Any, message: str
) -> None:
    base, adapter = make_pair(tmp_path, options, ["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ModelError, match=message):
        MergedWeights(base, adapter)


def test_magnitudes_are_not_dropped(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, {"use_dora": True}, ["q_proj"])
    change_config(adapter, use_dora=False)
    with pytest.raises(ModelError, match="magnitude.* is not expected"):
        MergedWeights(base, adapter)


def test_a_module_that_the_configuration_does_not_target_is_reported(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, {}, ["q_proj", "v_proj"])
    change_config(adapter, target_modules=["q_proj"])
    with pytest.raises(ModelError, match="v_proj can't be merged"):
        written(MergedWeights(base, adapter), tmp_path / "merged")


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, {}, ["q_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=r"quantised already \(fp8\).*Give the original model"):
        MergedWeights(base, adapter)


@pytest.mark.parametrize("config", [{"hidden_size": 128}, {"num_hidden_layers": 1}])
def test_the_wrong_base_is_refused_with_both_names(tmp_path: Path, config: dict[str, Any]) -> None:
    _, adapter = make_pair(tmp_path, {}, ["q_proj"])
    make_model(**config).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"made for owner/the-base, not for .*other"):
        written(MergedWeights(tmp_path / "other", adapter), tmp_path / "merged")


def test_modules_to_save_is_a_list(tmp_path: Path) -> None:
    """A text would be taken for its letters, and match nearly every module."""
    base, adapter = make_pair(tmp_path, {}, ["q_proj"])
    change_config(adapter, modules_to_save="lm_head")
    with pytest.raises(ModelError, match="modules_to_save"):
        MergedWeights(base, adapter)
