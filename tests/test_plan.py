"""What the machine makes of a recipe: precision, micro-batches and activation checkpointing, with the reasons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo import machine
from huarizo.errors import RecipeError
from huarizo.plan import Choice, ModelSize, Plan, choose_precision, make_plan, nearest_precision, read_plan
from huarizo.recipe import make_recipe
from tests.cpus import AMX, APPLE, AVX2, AVX512, NO_COMPILER, PI_4, VNNI, Cpu, pretend
from tests.test_machine import CPU, CUDA, MPS, with_card

INT8 = Choice("int8", "it is fast", torch.bfloat16)
SIZE = ModelSize(weights=1_165_492_224, trained=1_126_400, activations=4_820_992, checkpoints=300_000)
"""TinyLlama's in int8, with activations in bf16."""


@pytest.mark.parametrize(
    ("cpu", "missing", "precision", "dtype", "reason"),
    [
        (VNNI, None, "int8", torch.bfloat16, "vpdpbusd, 512 bit (tier avx512_vnni_bf16)"),
        (AVX512, None, "int8", torch.float32, "vpmaddwd, 512 bit (tier avx512)"),
        (AVX2, None, "int8", torch.float32, "this CPU multiplies int8 with vpmaddwd, 256 bit (tier avx2)"),
        (APPLE, None, "int8", torch.float32, "smmla (tier neon_i8mm)"),
        (AMX, None, "int8", torch.bfloat16, "amx_int8"),
        (VNNI, NO_COMPILER, "int8", torch.bfloat16, "int8 instructions that torch uses (avx512_vnni)"),
        (AMX, NO_COMPILER, "int8", torch.bfloat16, "amx_int8"),
        (AVX512, NO_COMPILER, "fp32", torch.float32, "int8 would be faster, but its kernel is missing: no C compiler"),
        (AVX2, NO_COMPILER, "fp32", torch.float32, "Install one: "),
        (APPLE, NO_COMPILER, "fp32", torch.float32, "no C compiler"),
        (PI_4, None, "fp32", torch.float32, "no int8 instructions"),
        (Cpu("x86_64", frozenset({"sse2"})), None, "fp32", torch.float32, "no int8 instructions"),
    ],
)
def test_a_cpu_takes_int8_where_its_tier_makes_it_faster(
    cpu: Cpu, missing: str | None, precision: str, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cpu, missing)
    monkeypatch.setattr(machine, "seconds", lambda *_: pytest.fail("known, not measured"))
    choice = choose_precision("auto", CPU)
    assert (choice.precision, choice.dtype) == (precision, dtype)
    assert reason in choice.reason


def test_the_tier_named_is_the_one_that_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old compiler doesn't know the best one."""
    pretend(monkeypatch, VNNI, compiled_for="avx2")
    assert choose_precision("auto", CPU).reason.endswith("(tier avx2)")


@pytest.mark.parametrize("wanted", ["fp32", "bf16", "int8"])
def test_what_is_asked_for_needs_no_kernel(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, AVX2, NO_COMPILER)
    monkeypatch.setattr("huarizo.kernels.int8.library", lambda: pytest.fail("compiled"))
    choice = choose_precision(wanted, CPU)
    assert (choice.precision, choice.reason) == (wanted, "as the recipe asks")
    assert choice.dtype == (torch.bfloat16 if wanted == "bf16" else torch.float32)


@pytest.mark.parametrize(
    ("bf16", "gain", "precision", "dtype"),
    [(True, 1.5, "int8", torch.bfloat16), (True, 1.0, "bf16", torch.bfloat16), (True, 0.0, "bf16", torch.bfloat16),
     (False, 0.4, "fp16", torch.float16), (False, 2.0, "int8", torch.float16), (True, None, "bf16", torch.bfloat16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cards", [1, 2])
def test_a_card_takes_int8_where_a_whole_layer_is_faster(
    bf16: bool, gain: float | None, precision: str, dtype: torch.dtype, cards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_card(monkeypatch, bf16, cards)
    measured = None if gain is None else lambda on, dtype: gain
    choice = choose_precision("auto", CUDA, measured)
    assert (choice.precision, choice.dtype) == (precision, dtype)
    assert choose_precision("int8", CUDA).precision == "int8"


@pytest.mark.parametrize(
    ("made_in", "on", "bf16", "found"),
    [("fp16", CPU, True, "fp32"), ("bf16", CUDA, False, "fp16"), ("int8", MPS, True, "fp32"),
     ("bf16", CPU, False, "bf16"), ("int8", CPU, False, "int8"), ("fp16", CUDA, True, "fp16")],
)  # fmt: skip
def test_a_run_from_elsewhere_goes_on_in_the_nearest_format(
    made_in: str, on: torch.device, bf16: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_card(monkeypatch, bf16)
    pretend(monkeypatch, AVX2)
    choice = nearest_precision(made_in, on)
    assert choice.precision == found
    assert (made_in in choice.reason) == (found != made_in)


def test_what_a_device_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, False)
    for wanted, on in (("fp16", CPU), ("bf16", CUDA), ("int8", MPS)):
        with pytest.raises(RecipeError, match="precision: .*(Use|use)"):
            choose_precision(wanted, on)
    assert choose_precision("int8", CPU).precision == "int8"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, bool]]:
    """Tokens at once, and whether activations are computed again, for so many free 10^9 bytes and a recipe."""

    def plan_for(free_gb: float, before: Plan | None = None, **recipe: Any) -> tuple[int, bool]:
        monkeypatch.setattr("huarizo.plan.available_memory", lambda *_: int(free_gb * 1e9))
        plan = make_plan(make_recipe(**recipe), INT8, SIZE, torch.device("cpu"), "", before)
        return plan.micro_batch_tokens, plan.activation_checkpointing

    return plan_for


def test_with_room_a_micro_batch_is_as_large_as_gains_speed(planned: Callable[..., tuple[int, bool]]) -> None:
    assert planned(22) == (1024, False)


def test_with_less_room_it_is_smaller(planned: Callable[..., tuple[int, bool]]) -> None:
    tokens, checkpointing = planned(6)
    assert tokens is not None and 512 <= tokens < 1024 and not checkpointing


@pytest.mark.parametrize("free_gb", [4, 1.5, 0.1])
def test_where_the_longest_row_does_not_fit_activations_are_computed_again(
    free_gb: float, planned: Callable[..., tuple[int, bool]]
) -> None:
    assert planned(free_gb) == (512, True)


def test_what_the_user_sets_is_kept(planned: Callable[..., tuple[int, bool]]) -> None:
    assert planned(1.5, training={"micro_batch_tokens": 300}) == (300, False)
    tokens, checkpointing = planned(1.5, trainer={"gradient_checkpointing": False})
    assert not checkpointing and tokens is not None and tokens >= 64


def test_micro_batches_stay_as_they_were_on_the_same_machine(planned: Callable[..., tuple[int, bool]]) -> None:
    before = make_plan(make_recipe(training={"micro_batch_tokens": 320}), INT8, SIZE, CPU, "")
    assert planned(22, before) == (320, False)
    assert planned(22, before, training={"micro_batch_tokens": 640}) == (640, False), "but for what the user says"


def test_a_plan_is_read_back_as_it_was_written() -> None:
    plan = make_plan(make_recipe(), INT8, SIZE, CPU, "there is no compiler")
    assert Plan.from_json(plan.to_json()) == plan
    assert not plan.compiled and plan.memory.weights == SIZE.weights and plan.is_for(plan.device, 1)
    assert not plan.is_for(plan.device, 2) and not plan.is_for("cpu: another", 1)


def test_layers_are_compiled_for_packed_batches_only() -> None:
    recipe, padded = make_recipe(), ("padded", "opt is new")
    plan = make_plan(recipe, INT8, SIZE, CPU, "", batching=padded)
    assert (plan.batching, plan.batching_reason, plan.compiled) == (*padded, False)
    assert plan.compilation == "batches are not packed" and Plan.from_json(plan.to_json()) == plan
    packed = make_plan(recipe, INT8, SIZE, CPU, "")
    assert packed.compiled and packed.with_batching("alone", "it is wrong").batching == "alone"
    resumed = make_plan(recipe, INT8, SIZE, CPU, "", plan)
    assert (resumed.batching, resumed.compiled) == ("padded", False), "a run keeps its batching"


def test_a_plan_that_says_no_batching_is_of_packed_ones() -> None:
    plan = make_plan(make_recipe(), INT8, SIZE, CPU, "")
    older = {name: value for name, value in json.loads(plan.to_json()).items() if not name.startswith("batching")}
    assert Plan.from_json(json.dumps(older)) == plan


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"dtype": "float32", "precision": "fp32"}', "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [("micro_batch_tokens", "abc"), ("micro_batch_tokens", None), ("micro_batch_tokens", 0), ("compiled", 1),
     ("precision", "fp8"), ("batching", "loose"), ("dtype", ["float32"]), ("memory", {"weights": 1}), ("world_size", True)],
)  # fmt: skip
def test_a_plan_with_a_damaged_field_is_none(field: str, value: Any, tmp_path: Path) -> None:
    text = make_plan(make_recipe(), INT8, SIZE, CPU, "").to_json()
    file = tmp_path / "plan.json"
    file.write_text(text)
    assert read_plan(file) is not None
    file.write_text(json.dumps(json.loads(text) | {field: value}))
    assert read_plan(file) is None and read_plan(tmp_path / "absent") is None


def test_a_model_that_is_spread_over_cards_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, bf16=True, count=2, free=10**9)
    plan = make_plan(make_recipe(), Choice("bf16", "", torch.bfloat16), SIZE, CUDA, "")
    assert not plan.compiled and plan.compilation == "the model is spread over several GPUs"
    assert plan.memory.available == 2 * 10**9
