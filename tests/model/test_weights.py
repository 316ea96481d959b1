"""A base whose files are not the weights that its config.json describes is refused, in every precision and use."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from huarizo.data.packing import pack
from huarizo.data.tokens import Example
from huarizo.errors import MachineError, ModelError
from huarizo.model import weights
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.load import load_base
from huarizo.model.merge import MergedWeights
from huarizo.model.skeleton import config_of, without_noise
from huarizo.model.weights import check_weights
from tests.tiny import make_model

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
USES: dict[str, Callable[[Path], Any]] = {
    "float": lambda folder: load_base(folder, torch.float32, CPU),
    "int8": lambda folder: load_quantised_base(folder, "int8", torch.float32, CPU, pack([Example([1], [1])])),
    "merging": lambda folder: MergedWeights(folder, None),
    "before data is read": check_weights,
}
Tensors = dict[str, torch.Tensor]
WRONG: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no head": (lambda t: t.pop("lm_head.weight"), "have no lm_head.weight .looked for in model.safetensors"),
    "no tensor": (lambda t: t.pop(UP), f"have no {UP} "),
    "seven gone": (lambda t: [t.pop(n) for n in list(t)[:7]], "and 2 more"),
    "shape": (lambda t: t.update({UP: t[UP][:5].clone()}), f"model.safetensors: {UP} has the shape .5, 64., but"),
    "a bias that is not used": (lambda t: t.update({"lm_head.bias": torch.ones(260)}), "lm_head.bias has no place"),
    "integers": (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP} is stored as I8, so this base is quantised"),
    "fp8": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), "F8_E4M3, so this base is quantised"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_missing_or_odd_is_named(wrong: str, use: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change, said = WRONG[wrong]
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"(?s)^{tmp_path}: .*{said}"):
        USES[use](tmp_path)


@pytest.mark.parametrize("use", USES)
def test_a_shard_without_one_of_its_tensors(use: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="60KB")
    place = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][UP]
    tensors = load_file(tmp_path / place)
    del tensors[UP]
    save_file(tensors, tmp_path / place)
    with pytest.raises(ModelError, match=rf"have no {UP} \(looked for in the \d files that model.safetensors.index"):
        USES[use](tmp_path)


@pytest.mark.parametrize("use", USES)
def test_harmless_differences_are_taken(use: str, tmp_path: Path) -> None:
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    USES[use](tmp_path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, tmp_path / "model.safetensors")
    USES[use](tmp_path)


class PanicException(BaseException):
    """As libraries in Rust raise it, by its name alone."""


@pytest.mark.parametrize("use", ["int8", "merging"])
@pytest.mark.parametrize("error", [PanicException("index out of bounds"), OSError("odd header"), KeyError("shape")])
def test_whatever_the_library_says_of_a_file_is_reported_with_its_name(
    error: BaseException, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: Any, **__: Any) -> None:
        raise error

    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr(weights, "safe_open", give_up)
    with pytest.raises(
        ModelError, match=f"{tmp_path / 'model.safetensors'}: the weights can't be loaded: .*{error.args[0]}"
    ):
        used = USES[use](tmp_path)
        used[UP]


def test_no_memory_for_a_tensor_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr(weights, "safe_open", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MachineError, match="model.safetensors: there is not enough memory"):
        USES["int8"](tmp_path)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "index",
    ["[]", '{"weight_map": 3}', '{"weight_map": {"a": 3, "b": "x"}}', '{"weight_map": {"a": [1]}}', "[" * 10_000],
)
def test_an_odd_index_is_reported(index: str, use: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=f"^{tmp_path}: model.safetensors.index.json can't be read as JSON"):
        USES[use](tmp_path)


def test_a_head_of_its_own_in_a_tied_model_is_the_one_that_is_quantised(tmp_path: Path) -> None:
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    head = USES["int8"](tmp_path).lm_head.dequantised()
    assert float((head - tensors["lm_head.weight"]).abs().max()) < 1e-3
    assert torch.equal(USES["float"](tmp_path).lm_head.weight, tensors["lm_head.weight"])


def test_names_without_the_prefix_and_masks_of_old_files_are_placed(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(old | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, tmp_path / "model.safetensors")
    check_weights(tmp_path)
    weights = MergedWeights(tmp_path, None)
    assert set(weights.names()) == tensors.keys()
    assert all(torch.equal(weights[name], tensors[name]) for name in tensors)
    base: Any = load_quantised_base(tmp_path, "int8", torch.float32, CPU, pack([Example([1, 2], [1, 2])]))
    assert torch.equal(base.transformer.wpe.weight, tensors["transformer.wpe.weight"])


def test_experts_are_stored_one_by_one(tmp_path: Path) -> None:
    """Transformers makes one tensor of them all on loading."""
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}  # fmt: skip
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(".experts.1.w2." in name for name in tensors)
    check_weights(tmp_path)
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    save_file({name: tensors[name] for name in tensors.keys() - experts.keys()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="the weights have no .*experts"):
        check_weights(tmp_path)


def test_a_base_drops_nothing(tmp_path: Path) -> None:
    """A frozen base gives the same activations in training as afterwards, and draws no random numbers."""
    GPT2Config(resid_pdrop=0.3, embd_pdrop=1).save_pretrained(tmp_path)
    found = config_of(tmp_path)
    assert (found.resid_pdrop, found.embd_pdrop, found.attn_pdrop) == (0, 0, 0) and found.n_head == 12
    inner = without_noise(Gemma3Config(text_config={"attention_dropout": 0.2}))
    assert inner.text_config.attention_dropout == 0
