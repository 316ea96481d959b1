"""The parts of any causal model of Transformers are found by looking at it."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from benchmarks.small_models import small_config
from huarizo.errors import ModelError
from huarizo.model.architectures.structure import (
    Structure,
    as_linear,
    linears_in,
    readers_seen,
    shape_of,
    structure_of,
)
from huarizo.model.skeleton import empty_model

OF_TYPES: dict[str, tuple[PretrainedConfig, tuple[str, str, str]]] = {
    "llama": (LlamaConfig(num_hidden_layers=2), ("model.embed_tokens", "model.layers", "lm_head")),
    "falcon": (FalconConfig(num_hidden_layers=2), ("transformer.word_embeddings", "transformer.h", "lm_head")),
    "gpt2": (GPT2Config(n_layer=2), ("transformer.wte", "transformer.h", "lm_head")),
    "bloom": (BloomConfig(n_layer=2), ("transformer.word_embeddings", "transformer.h", "lm_head")),
    "opt": (OPTConfig(num_hidden_layers=2), ("model.decoder.embed_tokens", "model.decoder.layers", "lm_head")),
    "mamba": (MambaConfig(num_hidden_layers=2), ("backbone.embeddings", "backbone.layers", "lm_head")),
}


@pytest.mark.parametrize("kind", OF_TYPES)
def test_embedding_layers_and_head_are_found(kind: str) -> None:
    config, (embedding, layers, head) = OF_TYPES[kind]
    assert structure_of(empty_model(config)) == Structure(embedding=embedding, layers=layers, head=head)


def test_a_list_within_a_layer_is_not_taken_for_the_layers() -> None:
    model: Any = empty_model(LlamaConfig(num_hidden_layers=2))
    model.model.layers[0].mlp.parts = nn.ModuleList([nn.Identity(), nn.Identity()])
    model.model.aside = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert structure_of(model).layers == "model.layers"


def test_what_is_not_found_is_named() -> None:
    model: Any = empty_model(LlamaConfig(num_hidden_layers=2))
    model.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match="llama: no list of 3 layers is found"):
        structure_of(model)
    model.config.num_hidden_layers, model.lm_head = 2, None
    with pytest.raises(ModelError, match="llama: no output head is found"):
        structure_of(model)


class Layer(nn.Module):
    """Linears of which some read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.never = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) + self.b(x.view(2, 2, 8)).view(4, 8)
        z = self.c(y)
        del y  # its memory is free, but for what is kept
        return self.d(z * 2) + self.d(z * 3)


@torch.no_grad()
def test_linears_that_read_the_same_memory_are_grouped() -> None:
    layer, x = Layer(), torch.randn(4, 8)
    with readers_seen(layer) as groups:
        layer(x)
    assert [group.paths for group in groups] == [["a", "b"], ["c"], ["d"], ["d"]]
    layer(x)
    assert len(groups) == 4, "nothing is noted after the block"


def test_a_transposed_linear_is_an_ordinary_one() -> None:
    conv = Conv1D(5, 3)
    nn.init.normal_(conv.bias)
    x, linear = torch.randn(2, 3), as_linear(conv)
    torch.testing.assert_close(linear(x), conv(x))
    assert shape_of(conv) == shape_of(linear) == (5, 3)
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    assert list(linears_in(nn.ModuleDict({"one": conv, "two": nn.ReLU()}))) == ["one"]


def test_layers_with_two_attentions_each_are_found() -> None:
    assert structure_of(empty_model(small_config("longcat_flash"))).layers == "model.layers"


@pytest.mark.parametrize(("kind", "name", "is_one"), [("falcon", "dense", True), ("deepseek_v4", "o_a_proj", False)])
def test_a_linear_layer_is_told_by_what_it_computes(kind: str, name: str, is_one: bool) -> None:
    found = linears_in(empty_model(small_config(kind)))
    assert any(path.endswith(f".{name}") for path in found) == is_one
