"""Added tokens have rows of their own, and are the same in training, in stock PEFT, in chat, merged and exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from huarizo.errors import Interrupted, ModelError, RecipeError, UserError
from huarizo.inference.artifact import find_tuned
from huarizo.inference.generate import generating, open_assistant
from huarizo.model.adapter import load_adapter, rewritten_weights, without_adapter
from huarizo.model.added_tokens import add_tokens, lengthened
from huarizo.model.load import load_tokenizer
from huarizo.model.lora import add_lora
from huarizo.model.loss import reference, summed_loss
from huarizo.model.merge import MergedWeights
from huarizo.recipe import LoraRecipe, Recipe, make_recipe
from huarizo.results.gguf import export_adapter, export_gguf
from huarizo.results.model_folder import merge
from huarizo.results.vocabulary import read_vocabulary
from huarizo.runs import Run
from huarizo.training.finetune import fine_tune, resume
from huarizo.training.prepare import prepare
from tests.model.test_merge import written
from tests.tiny import make_model, make_tokenizer

NEW = ["<think>", "</think>"]
DELTA = "base_model.model.{}.token_adapter.trainable_tokens_delta"
QUIET = Console(quiet=True)


def make_base(folder: Path, **values: Any) -> Path:
    config: dict[str, Any] = {"initializer_range": 0.2} | values
    make_model(**config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def recipe_for(base: Path, folder: Path, **values: Any) -> Recipe:
    rows = [{"instruction": f"Count to {n}", "output": f"<think>{n}</think>{n}"} for n in range(1, 9)]
    (folder / "rows.json").write_text(json.dumps(rows))
    lora = {"r": 2, "target_modules": ["q_proj"]} | values.pop("lora", {})
    training = {"epochs": 1, "learning_rate": 0.05, "compile": False} | values.pop("training", {})
    data = {"train": str(folder / "rows.json"), "eval": 2, "special_tokens": NEW} | values.pop("data", {})
    return make_recipe(
        **{"model": str(base), "precision": "fp32", "samples": 1, "output": str(folder / "run")} | values,
        lora=lora, training=training, data=data,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


BASES = {"untied": {}, "tied": {"tie_word_embeddings": True}, "spare rows": {"vocab_size": 270}}


@pytest.mark.parametrize("kind", [*BASES, "whole"])
def test_a_run_with_added_tokens_is_the_same_model_everywhere(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", **BASES.get(kind, {}))
    options = {"modules_to_save": ["embed_tokens", "lm_head"]} if kind == "whole" else {}
    run = fine_tune(recipe_for(base, tmp_path, lora={"options": options}), console=QUIET).run
    tuned = find_tuned(str(run.path))
    ids = tuned.encoder.tokenizer("a<think>b</think>", return_tensors="pt")["input_ids"]
    assert ids[0].tolist()[1::2] == [260, 261]
    assistant = open_assistant(tuned, "fp32")
    with torch.no_grad(), generating(assistant.model):
        loaded = assistant.model(ids).logits
        with assistant.untuned():
            before = assistant.model(ids).logits
        stock_base = LlamaForCausalLM.from_pretrained(base)
        plain = stock_base(ids[:, :1]).logits
        tokenizer = AutoTokenizer.from_pretrained(run.adapter)
        if len(tokenizer) > stock_base.config.vocab_size:
            stock_base.resize_token_embeddings(len(tokenizer))
        stock = PeftModel.from_pretrained(stock_base, str(run.adapter)).eval()(ids).logits
        merged = merge(tuned, tmp_path / "merged")
        again = LlamaForCausalLM.from_pretrained(merged)(ids).logits
    assert torch.allclose(before[:, 0, :260], plain[:, 0, :260], atol=1e-5)
    assert float((before - loaded).abs().max()) > 1e-2
    for logits in (stock, again):
        assert logits.shape == loaded.shape and float((logits - loaded).abs().max()) < 1e-4
    assert load_tokenizer(merged)("<think>")["input_ids"] == [260]
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is (kind == "tied")
    assert "resize_token_embeddings" in (run.adapter / "README.md").read_text()
    foreign = tmp_path / "foreign"
    shutil.copytree(run.adapter, foreign)
    assistant = open_assistant(find_tuned(str(foreign)), "fp32")
    with generating(assistant.model):
        assert torch.equal(assistant.model(ids).logits, loaded)


def test_only_the_rows_of_these_tokens_are_trained(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    run = fine_tune(recipe_for(base, tmp_path), console=QUIET).run
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    weights, merged = MergedWeights(base, None), MergedWeights(base, run.adapter)
    for name in ("model.embed_tokens", "lm_head"):
        assert tensors[DELTA.format(name)].shape == (2, 64)
        whole = merged[f"{name}.weight"]
        assert torch.equal(whole[:260], weights[f"{name}.weight"])
        mean = weights[f"{name}.weight"].mean(0)
        assert all(float((row - mean).abs().max()) > 1e-3 for row in whole[260:])


@pytest.mark.parametrize("tied", [False, True])
def test_a_stopped_run_goes_on_to_the_same_rows(tied: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    undisturbed = fine_tune(recipe_for(base, tmp_path, training={"epochs": 2}), console=QUIET).run
    recipe = recipe_for(base, tmp_path, training={"epochs": 2, "max_minutes": 1e-6}, output=str(tmp_path / "other"))
    with pytest.raises(Interrupted):
        fine_tune(recipe, console=QUIET)
    run = Run(tmp_path / "other")
    run.recipe_file.write_text(run.recipe_file.read_text().replace("max_minutes: 1.0e-06", "max_minutes: null"))
    resume(run, QUIET)
    one, other = (load_file(each.adapter / "adapter_model.safetensors") for each in (undisturbed, run))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_gguf_has_the_longer_vocabulary_and_no_adapter_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tuned = find_tuned(str(fine_tune(recipe_for(base, tmp_path), console=QUIET).run.path))
    import gguf

    file = export_gguf(tuned, tmp_path / "model.gguf", "f32")
    reader: Any = gguf.GGUFReader(file)
    assert reader.get_field("llama.vocab_size").contents() == 262
    assert reader.get_field("tokenizer.ggml.tokens").contents()[260:] == NEW
    assert {t.name: list(t.shape) for t in reader.tensors}["token_embd.weight"] == [64, 262]
    vocabulary = read_vocabulary(base, tuned.encoder.tokenizer, 262)
    assert vocabulary.types[260:] == [gguf.TokenType.USER_DEFINED] * 2
    with pytest.raises(ModelError, match="or added tokens"):
        export_adapter(tuned, tmp_path / "adapter.gguf")


def test_a_token_that_the_tokenizer_has_is_trained_where_it_is(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved|>"]})
    make_model(vocab_size=264).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = recipe_for(tmp_path / "base", tmp_path, data={"special_tokens": ["<|reserved|>"]})
    run = fine_tune(recipe, console=QUIET).run
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [260], "lm_head": [260]}
    encoder = find_tuned(str(run.path)).encoder
    assert 260 in encoder.encode_text("a<|reserved|>b")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"precision": "int8"}, r"data.special_tokens: .*with precision int8 the head.*precision=bf16 or fp32"),
        ({"data": {"special_tokens": ["<|im_end|>"]}}, r"'<\|im_end\|>' already marks sequences or turns"),
        ({"data": {"special_tokens": ["<|im_start|>"]}}, r"'<\|im_start\|>' already marks sequences or turns"),
        ({"lora": {"target_modules": ["lm_head"]}}, "lora.target_modules: with data.special_tokens"),
        ({"lora": {"options": {"modules_to_save": ["lm_head"]}}}, "name embedding and head.*not lm_head alone"),
    ],
)
def test_what_does_not_fit_is_reported_before_rows_are_read(values: Any, told: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(UserError, match=told):
        fine_tune(recipe_for(base, tmp_path, **values), console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("texts", [["a", "a"], [" a"], [""], ["a\n"], "a"])
def test_odd_texts_are_refused(texts: Any) -> None:
    with pytest.raises(RecipeError, match=r"data\.special_tokens"):
        make_recipe(data={"special_tokens": texts})


def test_new_rows_are_the_mean_of_the_others() -> None:
    weight = torch.randn(10, 4)
    longer = lengthened(weight, 12)
    assert torch.equal(longer[:10], weight) and torch.allclose(longer[10:], weight.mean(0).expand(2, 4))
    assert torch.equal(lengthened(weight, 3), weight)


def make_foreign(folder: Path, tied: bool, rows: int, tokenizer: Any | None, **config: Any) -> tuple[Path, Path, Any]:
    """A base, an adapter that PEFT saved on it with `rows` in embedding and head, and the tuned model."""
    base, adapter = make_base(folder / "base", tie_word_embeddings=tied), folder / "adapter"
    model: Any = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight += torch.randn_like(layer.weight) * 0.1
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **config)
    tuned: Any = get_peft_model(model, lora)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(str(adapter), save_embedding_layers=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(adapter)
    return base, adapter, tuned.eval()


def longer_tokenizer(count: int) -> Any:
    tokenizer = make_tokenizer()
    add_tokens(tokenizer, [f"<{number}>" for number in range(count)])
    return tokenizer


@pytest.mark.parametrize("rows", [262, 264])
@pytest.mark.parametrize("tied", [False, True])
def test_a_foreign_adapter_with_a_longer_embedding_is_taken(tied: bool, rows: int, tmp_path: Path) -> None:
    base, adapter, trained = make_foreign(tmp_path, tied, rows, longer_tokenizer(2))
    ids = torch.tensor([[5, 260, 261, 9]])
    model = LlamaForCausalLM.from_pretrained(base)
    plain = model(ids[:, :1]).logits
    rewritten = rewritten_weights(model, adapter)
    loaded = load_adapter(model, adapter)
    weights = MergedWeights(base, adapter)
    with torch.no_grad():
        wanted = trained(ids).logits
        merged = LlamaForCausalLM.from_pretrained(written(weights, tmp_path / "merged"))(ids).logits
        assert float((loaded(ids).logits - wanted).abs().max()) < 1e-5
        assert merged.shape == wanted.shape and float((merged - wanted).abs().max()) < 1e-4
        with without_adapter(loaded, rewritten):
            assert torch.allclose(loaded(ids[:, :1]).logits[..., :260], plain, atol=1e-6)
        assert float((loaded(ids).logits - wanted).abs().max()) < 1e-5
    assert weights.config["vocab_size"] == rows and weights.config["tie_word_embeddings"] is tied
    assert find_tuned(str(adapter)).encoder.tokenizer("<1>")["input_ids"] == [261]


@pytest.mark.parametrize("tokens", [None, 0, 5])
def test_rows_that_no_tokenizer_accounts_for_are_refused(tokens: int | None, tmp_path: Path) -> None:
    tokenizer = None if tokens is None else longer_tokenizer(tokens)
    base, adapter, _ = make_foreign(tmp_path, False, 262, tokenizer)
    beside = "there is no tokenizer beside it" if tokens is None else f"the tokenizer beside it has {260 + tokens}"
    told = rf"adapter_model.safetensors: it has rows for 262 tokens, the base for 260, and {beside}"
    with pytest.raises(ModelError, match=told):
        find_tuned(str(adapter))
    with pytest.raises(ModelError, match=told):
        MergedWeights(base, adapter)
    with pytest.raises(ModelError, match=told):
        load_adapter(LlamaForCausalLM.from_pretrained(base), adapter)


@pytest.mark.parametrize("ids", [[3], {"embed_tokens": [3, 7]}, {"model.embed_tokens": [3], "lm_head": [4]}])
@pytest.mark.parametrize("tied", [False, True])
def test_foreign_rows_of_single_tokens_are_merged_as_peft_means_them(ids: Any, tied: bool, tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base", tie_word_embeddings=tied), tmp_path / "adapter"
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=ids)
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(str(adapter), save_embedding_layers=False)
    tokens = torch.tensor([[3, 4, 7, 9]])
    with torch.no_grad():
        wanted = tuned.eval()(tokens).logits
        loaded = load_adapter(LlamaForCausalLM.from_pretrained(base), adapter)(tokens).logits
        merged = LlamaForCausalLM.from_pretrained(written(MergedWeights(base, adapter), tmp_path / "merged"))(tokens)
    assert float((loaded - wanted).abs().max()) < 1e-5
    assert float((merged.logits - wanted).abs().max()) < 1e-4


def test_left_to_the_machine_the_precision_is_a_float_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    assert prepare(recipe_for(base, tmp_path, precision="auto")).plan.choice.precision != "int8"


def test_a_tokenizer_that_no_row_needs_may_be_broken(tmp_path: Path) -> None:
    base, adapter, _ = make_foreign(tmp_path, False, 262, longer_tokenizer(2))
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        find_tuned(str(adapter))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    plain = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    plain.save_pretrained(str(adapter), save_embedding_layers=False)
    assert len(find_tuned(str(adapter), base=str(base)).encoder.tokenizer) == 260


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradient_of_the_rows_are_those_of_all_logits(tied: bool) -> None:
    model = make_model(vocab_size=262, tie_word_embeddings=tied).requires_grad_(False)
    head = add_lora(model, LoraRecipe(r=2), 0, [260, 261]).get_base_model().lm_head
    rows = next(parameter for parameter in head.parameters() if parameter.requires_grad)
    hidden, targets = torch.randn(20, 64), torch.randint(255, 262, (20,))
    found = []
    for loss in (summed_loss, reference):
        value = loss(hidden, head, targets)
        (gradient,) = torch.autograd.grad(value, [rows])
        found.append((value.detach(), gradient))
    assert torch.allclose(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert float(found[0][1].abs().max()) > 0
