"""Packed training that is not right for a model is found before the first step, and padded rows are taken."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

from huarizo.data.tokens import Example
from huarizo.errors import ModelError
from huarizo.model import batching
from huarizo.model.attention import NAME as PACKED
from huarizo.model.attention import packed_attention
from huarizo.model.batching import check_batching, planned_batching, require_gradients
from huarizo.model.lora import add_lora
from huarizo.recipe import make_recipe
from tests.tiny import make_model
from tests.training.make import lora_model, random_examples

EXAMPLES = [Example(row["input_ids"], row["labels"]) for row in random_examples([60, 50, 40])]
RECIPE = make_recipe(lora={"dropout": 0.3})


@pytest.fixture
def packed_with() -> Iterator[Callable[..., None]]:
    """Replaces packed attention within a test."""
    yield lambda attention: AttentionInterface.register(PACKED, attention)
    AttentionInterface.register(PACKED, packed_attention)


def scaled(*args: Any, scaling: float, **kwargs: Any) -> Any:
    """Packed attention with another scale."""
    return packed_attention(*args, scaling=1.1 * scaling, **kwargs)


def without_window(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
    """Packed attention that ignores a window."""
    return packed_attention(*args, **kwargs)


def mistral() -> PeftModel:
    """It sees eight tokens."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.2,
    )  # fmt: skip
    return add_lora(MistralForCausalLM(config).requires_grad_(False), RECIPE.lora, 0)


def attention_of(model: Any) -> str:
    return model.get_base_model().config._attn_implementation


def test_a_right_model_stays_packed_and_as_it_was() -> None:
    model = lora_model(RECIPE, initializer_range=0.2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    assert check_batching(model, "packed", EXAMPLES) == batching.Checked("packed", [])
    assert attention_of(model) == PACKED and model.training and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bar_is_far_above_rounding_and_below_what_is_wrong(
    dtype: torch.dtype, packed_with: Callable[..., None]
) -> None:
    base: Any = make_model(initializer_range=0.2).requires_grad_(False)
    model = add_lora(base.to(dtype), RECIPE.lora, 0)
    assert check_batching(model, "packed", EXAMPLES).batching == "packed"
    packed_with(lambda *args, scaling, **kwargs: packed_attention(*args, scaling=3 * scaling, **kwargs))
    assert check_batching(model, "packed", EXAMPLES).batching == "padded"


def test_a_wrong_scale_is_found(packed_with: Callable[..., None]) -> None:
    packed_with(scaled)
    model = lora_model(RECIPE, initializer_range=0.2)
    checked = check_batching(model, "packed", EXAMPLES)
    assert checked.batching == "padded" and attention_of(model) == "sdpa"
    (fault,) = checked.faults
    assert fault.startswith("packed rows have a loss of ") and "by one with the model's own code" in fault


def test_a_window_that_is_ignored_is_found(packed_with: Callable[..., None]) -> None:
    packed_with(without_window)
    assert check_batching(mistral(), "packed", EXAMPLES).batching == "padded"


def test_a_window_that_is_refused_is_no_end(packed_with: Callable[..., None]) -> None:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise ModelError("packed attention has no sliding_window=8")

    packed_with(refusing)
    checked = check_batching(mistral(), "packed", EXAMPLES)
    assert checked.batching == "padded" and "(packed attention has no sliding_window=8)" in checked.faults[0]


def test_where_padding_is_wrong_too_examples_stay_alone(packed_with: Callable[..., None]) -> None:
    packed_with(scaled)
    model: Any = lora_model(RECIPE, initializer_range=0.2)

    def by_rows(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1.1 if len(output) > 1 else 1.0)

    model.get_base_model().get_input_embeddings().register_forward_hook(by_rows)
    checked = check_batching(model, "packed", EXAMPLES)
    assert checked.batching == "alone" and [fault.split()[0] for fault in checked.faults] == ["packed", "padded"]
    assert check_batching(model, "padded", EXAMPLES).batching == "alone"


@pytest.mark.parametrize("length", [1, 2, 5])
def test_very_short_rows_do(length: int) -> None:
    examples = [Example([7] * length, [7] * length)]
    assert check_batching(lora_model(RECIPE), "packed", examples).batching == "packed"


def test_a_model_whose_own_code_fails_is_one_error() -> None:
    model: Any = lora_model(RECIPE)

    def broken(*args: Any) -> None:
        raise RuntimeError("no kernel\nread the manual")

    model.get_base_model().get_input_embeddings().register_forward_hook(broken)
    for check in (
        lambda: check_batching(model, "padded", EXAMPLES),
        lambda: require_gradients(model, "padded", EXAMPLES),
    ):
        with pytest.raises(ModelError, match=r"LlamaForCausalLM can't be trained on a few rows: no kernel$"):
            check()


def test_a_lora_that_no_gradient_reaches_is_one_error() -> None:
    model: Any = lora_model(RECIPE)
    require_gradients(model, "padded", EXAMPLES)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ModelError, match="passes no gradient to the LoRA. Set other lora.target_modules"):
        require_gradients(model, "padded", EXAMPLES)


def test_what_padding_is_known_to_change_stays_alone() -> None:
    assert planned_batching({"model_type": "doge"}) == ("alone", "doge is known to change examples that are padded")
    assert planned_batching({"model_type": "falcon"})[0] == "padded"
