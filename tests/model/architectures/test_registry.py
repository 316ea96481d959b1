"""Every row of the registry, and an architecture that no package knows, is the model that Transformers makes of it.

What is computed of it on packed rows is compared with stock Transformers and PEFT on padded rows.
"""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationMixin, LlamaConfig
from transformers.masking_utils import create_causal_mask
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
from huarizo.model.architectures.registry import ARCHITECTURES, EMBEDDINGS, HEADS, architecture_of
from huarizo.model.architectures.structure import linears_in, structure_of
from huarizo.model.compile import compile_layers
from huarizo.model.frozen.linear import FrozenLinear
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.load import load_base, read_config, weight_bytes
from huarizo.model.lora import add_lora, count_weights
from huarizo.model.loss import PackedLoss
from huarizo.model.merge import MergedWeights
from huarizo.model.targets import linear_names
from huarizo.recipe import make_recipe
from huarizo.results.gguf import layout_of
from tests.stock import padded_loss_and_gradients

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
MIXED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "toy": {"tie_word_embeddings": False}, "llama": {}, "llama tied": {"tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True}, "cohere2": {"logit_scale": 0.5, "head_dim": 16, **MIXED},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0, **MIXED},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 20, "final_logit_softcapping": 3.0, **MIXED},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "gpt2": {"resid_pdrop": 0.5},
    "gpt_neox": {"rotary_pct": 0.5, "hidden_dropout": 0.5}, "gpt_neox serial": {"use_parallel_residual": False},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.3},
    "mistral": {"sliding_window": None, "head_dim": 32}, "mistral window": {"sliding_window": 8},
    "olmo2": {}, "olmo3": MIXED, "phi3": {"resid_pdrop": 0.5},
    "qwen2": {}, "qwen2 window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 32}, "smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip
"""A small model of each row of the registry, and variants; the first word is the model_type."""
generator = torch.Generator().manual_seed(0)
ROWS = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (9, 30, 17)]
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
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        hidden: Any = self.wte(input_ids)
        embeddings = self.rope(hidden, position_ids)
        mask: Any = create_causal_mask(self.config, hidden, attention_mask, None, position_ids=position_ids)
        for layer in self.h:
            hidden = layer(hidden, mask, position_embeddings=embeddings, position_ids=position_ids, **kwargs)
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


AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)


def small_config(name: str) -> Any:
    """The configuration of a small model."""
    return CONFIG_MAPPING[name.split()[0]](**SIZES | CONFIGS[name])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture(params=CONFIGS)
def folder(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small model with random weights; norms and biases are random too."""
    name = request.param
    monkeypatch.setitem(ARCHITECTURES, "toy", Architecture(model_type="toy", packs=True))
    if name not in folders:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(name))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, parameter.mean().item(), 0.1)
        folders[name] = tmp_path_factory.mktemp("model")
        model.save_pretrained(folders[name])
    return folders[name]


def with_lora(base: Any) -> Any:
    model = add_lora(base, make_recipe(lora={"dropout": 0, "target_modules": "all-linear"}).lora, seed=1)
    return seeded(model).train()


def seeded(model: Any) -> Any:
    """The same numbers in every adapter of these shapes."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def loss_and_gradients(model: Any, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the labelled tokens, and every trainable gradient."""
    model.zero_grad()
    batch = pack(examples)
    loss = PackedLoss(model.get_base_model())(model, batch) / batch.num_labels
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def joined(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


def test_packed_rows_equal_padded_rows_of_stock_transformers(folder: Path) -> None:
    ours = with_lora(load_base(folder, torch.float32, CPU))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    head = structure_of(stock).vocabulary_layers[1]
    linears = [name for name in linear_names(stock) if name != head]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=linears, fan_in_fan_out="c_attn" in linears)
    stock = seeded(get_peft_model(stock, config)).eval()
    padded, exact = padded_loss_and_gradients(
        stock, [{"input_ids": list(example.input_ids), "labels": list(example.labels)} for example in EXAMPLES]
    )
    packed, gradients = loss_and_gradients(ours, EXAMPLES)
    assert packed == pytest.approx(padded, rel=1e-5)
    assert gradients.keys() == exact.keys() and len(gradients) >= 2 * 2 * 4
    assert float((joined(gradients) - joined(exact)).norm() / joined(exact).norm()) < 1e-5


def test_an_int8_base_is_close_to_the_float_one(folder: Path) -> None:
    plain = load_base(folder, torch.float32, CPU)
    base = load_quantised_base(folder, "int8", torch.float32, CPU, pack(EXAMPLES))
    assert linear_names(base) == linear_names(plain) and count_weights(base) == count_weights(plain)
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    assert all(isinstance(linear, FrozenLinear) for linear in linears_in(base).values())
    assert list(linears_in(base)) == list(linears_in(plain))
    (ours, gradients), (theirs, exact) = (loss_and_gradients(with_lora(each), EXAMPLES) for each in (base, plain))
    assert ours == pytest.approx(theirs, rel=1e-2) and gradients.keys() == exact.keys()
    assert torch.cosine_similarity(joined(gradients), joined(exact), dim=0) > 0.998


def test_an_example_does_not_see_its_neighbours(folder: Path) -> None:
    base = load_base(folder, torch.float32, CPU).eval()
    loss, others = PackedLoss(base), [Example(row[::-1], row[::-1]) for row in ROWS]
    before = loss.by_token(base, pack([others[0], EXAMPLES[1], others[2]]))
    after = loss.by_token(base, pack([others[0], EXAMPLES[1], Example(ROWS[2], ROWS[2])]))
    seen = len(others[0].labels) - 1 + len(EXAMPLES[1].labels) - 4
    assert torch.equal(before[:seen], after[:seen]) and not torch.equal(before[seen:], after[seen:])


def test_an_adapter_is_saved_loaded_and_merged(folder: Path, tmp_path: Path) -> None:
    model = with_lora(load_base(folder, torch.float32, CPU))
    before = loss_and_gradients(model, EXAMPLES)[0]
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    again: Any = load_adapter(load_base(folder, torch.float32, CPU), tmp_path)
    with torch.no_grad():
        batch = pack(EXAMPLES)
        loss = PackedLoss(again.get_base_model())(again, batch).item() / batch.num_labels
    assert loss == pytest.approx(before, rel=1e-6)
    weights, merged = MergedWeights(folder, tmp_path), again.merge_and_unload().state_dict()
    for name in weights.names():
        torch.testing.assert_close(weights[name], merged[name], rtol=0, atol=1e-5)


def test_rows_of_tokens_are_trained_under_its_names(folder: Path) -> None:
    base = load_base(folder, torch.float32, CPU)
    embedding, head = structure_of(base).vocabulary_layers
    lora = make_recipe(lora={"dropout": 0, "target_modules": "all-linear"}).lora
    model: Any = add_lora(base, lora, seed=1, tokens=[3, 5])
    tied = base.config.tie_word_embeddings
    assert model.peft_config["default"].trainable_token_indices == (
        [3, 5] if tied else {embedding: [3, 5], head: [3, 5]}
    )
    _, gradients = loss_and_gradients(model, EXAMPLES)
    assert sum("trainable_tokens_delta" in name for name in gradients) == (1 if tied else 2)
    assert isinstance(base, ToyForCausalLM) or (embedding in EMBEDDINGS and head in HEADS)


def test_its_layers_are_the_ones_that_are_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    base = load_base(folder, torch.float32, CPU)
    compile_layers(with_lora(base))
    assert compiled == list(cast(Any, base.get_submodule(structure_of(base).layers))) and len(compiled) == 2


def test_wrong_sizes_and_missing_layers_are_named(folder: Path, tmp_path: Path) -> None:
    config = read_config(folder)
    assert weight_bytes(config, "fp32", torch.float32) > weight_bytes(config, "int8", torch.float32)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    layers = {name: 3 for name in ("num_hidden_layers", "n_layer") if name in config}
    changed = {"layer_types": None, "no_rope_layers": None}
    written = {name: value for name, value in (config | changed | layers).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ModelError, match="it has 3 layers, but the weights have 2"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    embedding = structure_of(AutoModelForCausalLM.from_pretrained(folder)).embedding
    with pytest.raises(ModelError, match=rf"{embedding}.weight has the shape \[97, 64\]"):
        MergedWeights(tmp_path, None)


def test_only_what_llama_cpp_is_known_to_compute_is_exported(folder: Path) -> None:
    weights = MergedWeights(folder, None)
    if layout := weights.architecture.gguf:
        assert layout_of(weights) is layout
    else:
        with pytest.raises(ModelError, match="models can't be written as GGUF here. `huarizo merge` writes"):
            layout_of(weights)


def test_every_row_that_packs_is_tested() -> None:
    packed = {architecture.model_type for architecture in ARCHITECTURES.values() if architecture.packs}
    with_experts = {"gpt_oss"}  # has no int8; tests/end_to_end/test_types.py
    assert packed == {name.split()[0] for name in CONFIGS} - {"toy"} | with_experts


def test_every_field_of_a_rule_is_one_of_the_configuration() -> None:
    for architecture in ARCHITECTURES.values():
        fields = architecture.logits
        for name in (fields.multiplied_by, fields.divided_by, fields.capped_at):
            assert name is None or hasattr(CONFIG_MAPPING[architecture.model_type](), name), architecture


def test_what_has_no_row_is_not_packed() -> None:
    found = architecture_of({"model_type": "falcon"})
    assert (found.model_type, found.packs, found.gguf) == ("falcon", False, None)
    assert architecture_of(LlamaConfig()).packs
