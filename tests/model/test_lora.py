"""Every option of PEFT's LoRA is refused before rows are read, or trains, chats, merges, exports and loads in PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import CONFIG_MAPPING, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from huarizo.errors import RecipeError
from huarizo.model.adapter import load_adapter
from huarizo.model.load import load_base
from huarizo.model.lora import add_lora, check_lora
from huarizo.model.merge import MergedWeights
from huarizo.model.targets import with_targets
from huarizo.recipe import make_recipe
from huarizo.results.gguf import export_gguf
from huarizo.training.finetune import fine_tune
from tests.model.test_merge import written
from tests.results.make import make_tuned
from tests.tiny import make_model, make_tokenizer

TAKEN: dict[str, dict[str, Any]] = {
    "nothing": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True},
    "no init": {"init_lora_weights": False}, "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"}, "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"}, "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"}, "layers": {"layers_to_transform": [0]},
    "all but one": {"exclude_modules": ["layers.0.self_attn.q_proj"]}, "head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]}, "norms": {"modules_to_save": ["norm"]},
    "a linear layer": {"modules_to_save": ["o_proj"]}, "defaults": {"bias": "none", "use_qalora": False},
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "bias": ["lora_only", "all"], "lora_bias": [True], "layer_replication": [[[0, 1], [0, 2]]],
    "ensure_weight_tying": [True], "use_qalora": [True], "qalora_group_size": [8], "fan_in_fan_out": [True],
    "trainable_token_indices": [[3, 5], {"embed_tokens": [3]}], "target_parameters": [["k_proj.weight"]],
    "init_lora_weights": ["eva", "corda", "lora_ga", "loftq", "pissa_niter_4", "nope", 3], "eva_config": [{}],
    "corda_config": [{}], "lora_ga_config": [{}], "loftq_config": [{"loftq_bits": 4}], "arrow_config": [{}],
    "velora_config": [{}], "alora_invocation_tokens": [[1, 2]], "kasa_config": [{}], "use_bdlora": [{}],
    "monteclora_config": [{}], "runtime_config": [{}], "inference_mode": [True], "task_type": ["SEQ_CLS"],
    "peft_type": ["IA3"], "revision": ["main"], "base_model_name_or_path": ["x"], "peft_version": ["1"],
    "layers_to_transform": [[9], "all"], "layers_pattern": ["layers"], "modules_to_save": ["lm_head", ["nope"]],
    "exclude_modules": [".*0.*", ["q_proj"]], "rank_pattern": [{"nope": 2}, {"q_proj": 0}, {".*q_proj": 2}],
    "alpha_pattern": [{"nope": 2}], "use_rslora": ["yes"], "use_dora": [1],
}  # fmt: skip


def test_every_option_of_this_peft_is_in_one_table_or_the_other() -> None:
    elsewhere = {"r", "lora_alpha", "lora_dropout", "target_modules"}  # settings of the recipe
    imports = {"auto_mapping", "megatron_config", "megatron_core"}  # refused in the recipe
    assert elsewhere | imports | REFUSED.keys() == set(LoraConfig.__dataclass_fields__)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken_is_the_same_model_everywhere(kind: str, tied: bool, tmp_path: Path) -> None:
    recipe = make_recipe(lora={"r": 4, "target_modules": ["q_proj", "down_proj"], "options": TAKEN[kind]})
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make_model(tie_word_embeddings=tied, initializer_range=0.2)
    model.save_pretrained(base)
    check_lora(base, recipe.lora, "fp32")
    tuned = add_lora(model.requires_grad_(False), recipe.lora, 0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(str(adapter), save_embedding_layers=False)
    ids = torch.randint(0, 260, (1, 20))
    with torch.no_grad():
        trained = tuned.eval()(ids).logits
        plain = LlamaForCausalLM.from_pretrained(base)(ids).logits
        stock = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter)).eval()(ids).logits
        loaded = load_adapter(LlamaForCausalLM.from_pretrained(base), adapter)(ids).logits
        merged = written(MergedWeights(base, adapter), tmp_path / "merged")
        merged_logits = LlamaForCausalLM.from_pretrained(merged)(ids).logits
    assert float((plain - trained).abs().max()) > 1e-2
    for logits in (stock, loaded, merged_logits):
        assert float((logits - trained).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken_is_exported(kind: str, tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path, make_tokenizer(), TAKEN[kind], targets=["q_proj", "down_proj"])
    assert export_gguf(tuned, tmp_path / "model.gguf", "f32").stat().st_size > 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_before_rows_are_read(name: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    for value in REFUSED[name]:
        recipe = make_recipe(
            model=str(tiny_model_folder), precision="fp32", output=str(tmp_path / "run"),
            data={"train": str(Path(__file__))}, lora={"target_modules": ["q_proj"], "options": {name: value}},
        )  # fmt: skip
        with pytest.raises(RecipeError, match=name):
            fine_tune(recipe)
        assert not (tmp_path / "run").exists()


def test_dora_on_8_bit_is_reported_before_rows_are_read(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="use_dora: not supported with precision int8"):
        check_lora(tmp_path, make_recipe(lora={"options": {"use_dora": True}}).lora, "int8")


def test_a_head_in_8_bit_is_not_trained_as_a_whole(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    lora = make_recipe(lora={"options": {"modules_to_save": ["lm_head"]}}).lora
    check_lora(tmp_path, lora, "bf16")
    with pytest.raises(RecipeError, match="modules_to_save: with precision int8 lm_head is frozen"):
        check_lora(tmp_path, lora, "int8")


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", ["q_proj", "v_proj"]), ("gpt_neox", ["query_key_value"]), ("gpt2", ["c_attn"]), ("phi3", "all-linear"),
     ("olmo2", ["q_proj", "v_proj"])],
)  # fmt: skip
def test_the_default_targets_are_layers_that_the_model_has(kind: str, targets: Any) -> None:
    config_class: Any = CONFIG_MAPPING[kind]
    config = config_class(num_hidden_layers=1, vocab_size=50, pad_token_id=0).to_dict()
    lora = with_targets(make_recipe().lora, config)
    assert lora.target_modules == targets
    chosen = make_recipe(lora={"target_modules": ["o_proj"]}).lora
    assert with_targets(chosen, config) == chosen


def test_an_adapter_on_transposed_weights_says_so_and_merges(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, initializer_range=0.2)).save_pretrained(
        tmp_path / "base"
    )
    recipe = make_recipe(lora={"r": 4, "target_modules": ["c_attn", "c_proj"], "options": {"use_dora": True}})
    check_lora(tmp_path / "base", recipe.lora, "fp32")
    tuned: Any = add_lora(load_base(tmp_path / "base", torch.float32, torch.device("cpu")), recipe.lora, 0)
    assert tuned.peft_config["default"].fan_in_fan_out
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    weights = MergedWeights(tmp_path / "base", tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    assert set(weights.changes) and all(
        torch.allclose(weights[name], merged[name], rtol=0, atol=1e-5) for name in weights.names()
    )
