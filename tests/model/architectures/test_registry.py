"""An architecture is a row: one with other names and another one of Transformers train without a line in the package.

What is computed of it, packed, is compared with stock Transformers and PEFT, example by example.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, LlamaConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from huarizo.data.packing import pack
from huarizo.data.tokens import Example
from huarizo.errors import ModelError
from huarizo.model.adapter import load_adapter
from huarizo.model.architectures.architecture import Architecture
from huarizo.model.architectures.llama import LLAMA
from huarizo.model.architectures.registry import ARCHITECTURES, architecture_of, register
from huarizo.model.compile import compile_layers
from huarizo.model.frozen.linear import FrozenLinear
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.load import load_base, read_config, weight_bytes
from huarizo.model.lora import add_lora, count_weights, linear_names
from huarizo.model.loss import PackedLoss
from huarizo.model.merge import MergedWeights
from huarizo.recipe import make_recipe
from huarizo.results.gguf import layout_of
from tests.stock import padded_loss_and_gradients

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
generator = torch.Generator().manual_seed(0)
ROWS = [torch.randint(97, (length,), generator=generator).tolist() for length in (9, 30, 17)]
EXAMPLES = [Example(row, [-100] * 4 + row[4:]) for row in ROWS]


class ToyConfig(LlamaConfig):
    """Of a model that no package knows."""

    model_type = "toy"


class ToyModel(LlamaPreTrainedModel):
    """A decoder whose parts have names of their own."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(LlamaDecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.ln_f = LlamaRMSNorm(config.hidden_size)
        self.rope = LlamaRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.wte = value

    def forward(
        self, input_ids: torch.Tensor, position_ids: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        assert attention_mask is None or attention_mask.all()
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        hidden: Any = self.wte(input_ids)
        embeddings = self.rope(hidden, position_ids)
        for layer in self.h:
            hidden = layer(hidden, position_embeddings=embeddings, position_ids=position_ids, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden))


class ToyForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """It with a head."""

    config_class = ToyConfig
    base_model_prefix = "transformer"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.transformer = ToyModel(config)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.unembed = new_embeddings

    def forward(
        self, input_ids: torch.Tensor, labels: Any = None, logits_to_keep: Any = slice(None), **kwargs: Any
    ) -> CausalLMOutputWithPast:
        hidden = cast(torch.Tensor, self.transformer(input_ids, **kwargs).last_hidden_state)
        logits = self.unembed(hidden[:, logits_to_keep])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


TOY = dataclasses.replace(
    LLAMA,
    model_type="toy",
    described="toys",
    embedding="transformer.wte",
    layers="transformer.h",
    norm="transformer.ln_f",
    rotary_embedding="transformer.rope",
    head="unembed",
    gguf=None,
)
QWEN2 = dataclasses.replace(LLAMA, model_type="qwen2", described="Qwen2", gguf=None)
MAKE: dict[str, tuple[Architecture, Callable[[], Any]]] = {
    "toy": (TOY, lambda: ToyForCausalLM(ToyConfig(**SIZES))),
    "qwen2": (QWEN2, lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=False))),
}
AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)


@pytest.fixture(params=MAKE)
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small model of an architecture that is registered in this test alone."""
    architecture, make = MAKE[request.param]
    monkeypatch.setattr("huarizo.model.architectures.registry.ARCHITECTURES", dict(ARCHITECTURES))
    register(architecture)
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    return tmp_path


def with_lora(base: Any) -> Any:
    model = add_lora(base, make_recipe(lora={"dropout": 0, "target_modules": "all-linear"}).lora, seed=1)
    return seeded(model)


def seeded(model: Any) -> Any:
    """The same numbers in every adapter of these shapes."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def loss_and_gradients(model: Any, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = PackedLoss(model.get_base_model())(model, pack(examples))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_float_base_equals_stock_transformers_example_by_example(folder: Path) -> None:
    ours = with_lora(load_base(folder, torch.float32, CPU))
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    stock = seeded(get_peft_model(stock, LoraConfig(r=8, lora_alpha=16, target_modules=linears)))
    sums: dict[str, torch.Tensor] = {}
    total = 0.0
    for example in EXAMPLES:
        loss, gradients = padded_loss_and_gradients(stock, [{"input_ids": example.input_ids, "labels": example.labels}])
        count = len(example.labels) - 4
        total += loss * count
        sums = {name: sums.get(name, 0) + count * gradient for name, gradient in gradients.items()}
        assert loss_and_gradients(ours, [example])[0] == pytest.approx(loss * count, rel=1e-5)
    packed, gradients = loss_and_gradients(ours, EXAMPLES)
    assert packed == pytest.approx(total, rel=1e-5)
    assert gradients.keys() == sums.keys() and len(sums) == 2 * 2 * 7
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, sums[name], rtol=1e-4, atol=1e-4)


def test_an_int8_base_is_close_to_the_float_one(folder: Path) -> None:
    plain = load_base(folder, torch.float32, CPU)
    base = load_quantised_base(folder, "int8", torch.float32, CPU, pack(EXAMPLES))
    assert linear_names(base) == linear_names(plain) and count_weights(base) == count_weights(plain)
    assert sum(isinstance(module, FrozenLinear) for module in base.modules()) == 2 * 7 + 1
    (ours, gradients), (theirs, exact) = (loss_and_gradients(with_lora(each), EXAMPLES) for each in (base, plain))
    assert ours == pytest.approx(theirs, rel=1e-2) and gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.95, name


def test_an_adapter_is_saved_loaded_and_merged(folder: Path) -> None:
    model = with_lora(load_base(folder, torch.float32, CPU))
    before = loss_and_gradients(model, EXAMPLES)[0]
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    again = load_adapter(load_base(folder, torch.float32, CPU), folder / "adapter")
    with torch.no_grad():
        assert PackedLoss(again.get_base_model())(again, pack(EXAMPLES)).item() == pytest.approx(before, rel=1e-6)
    weights, merged = MergedWeights(folder, folder / "adapter"), again.merge_and_unload().state_dict()
    for name in weights.names():
        torch.testing.assert_close(weights[name], merged[name], rtol=0, atol=1e-6)


def test_rows_of_tokens_are_trained_under_its_names(folder: Path) -> None:
    base = load_base(folder, torch.float32, CPU)
    embedding, head = architecture_of(base.config).vocabulary_layers
    model = add_lora(base, make_recipe(lora={"dropout": 0}).lora, seed=1, tokens=[3, 5])
    assert model.peft_config["default"].trainable_token_indices == {embedding: [3, 5], head: [3, 5]}
    _, gradients = loss_and_gradients(model, EXAMPLES)
    assert sum("trainable_tokens_delta" in name for name in gradients) == 2


def test_without_a_gguf_layout_it_is_not_exported(folder: Path) -> None:
    with pytest.raises(ModelError, match="models can't be written as GGUF"):
        layout_of(MergedWeights(folder, None))


def test_its_layers_are_the_ones_that_are_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    base = load_base(folder, torch.float32, CPU)
    compile_layers(with_lora(base))
    assert compiled == list(cast(Any, base.get_submodule(architecture_of(base.config).layers)))


def test_wrong_sizes_and_missing_layers_are_named_by_its_names(folder: Path) -> None:
    config = read_config(folder)
    assert weight_bytes(config, "fp32", torch.float32) > weight_bytes(config, "int8", torch.float32)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="it has 3 layers, but the weights have 2"):
        read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    with pytest.raises(ModelError, match=rf"{architecture_of(config).embedding}.weight has the shape \[97, 64\]"):
        MergedWeights(folder, None)


def test_without_its_row_it_is_refused() -> None:
    assert list(ARCHITECTURES) == ["llama"]
    for config in ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, Qwen2Config()):
        with pytest.raises(ModelError, match=r"the architecture is 'qwen2' .* Huarizo trains the Llama architecture"):
            architecture_of(config)
    with pytest.raises(ModelError, match=r"some/folder: the architecture is 'list' \(no class named\)"):
        architecture_of([], "some/folder")
