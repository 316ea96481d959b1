"""The choice of precision: what is fastest and right, with the reason in words."""

import warnings
from pathlib import Path

import pytest
import torch

from huarizo import host, machine
from huarizo.errors import RecipeError
from huarizo.machine import choose_precision

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def with_card(monkeypatch: pytest.MonkeyPatch, bf16: bool, count: int = 1, free: int = 10**9) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda on: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda on: "Tesla T4")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("flags", "precision", "dtype"),
    [({"avx512_vnni", "avx512_bf16"}, "int8", torch.bfloat16), ({"avx_vnni"}, "int8", torch.float32),
     ({"amx_int8", "amx_bf16"}, "int8", torch.bfloat16)],
    ids=["vnni and bf16", "avx_vnni", "amx"],
)  # fmt: skip
def test_a_cpu_with_int8_instructions_takes_int8(
    flags: set[str], precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: flags)
    monkeypatch.setattr(machine, "gemm_rates", lambda on: pytest.fail("known, not measured"))
    choice = choose_precision("auto", CPU)
    assert (choice.precision, choice.dtype) == (precision, dtype)
    assert any(flag in choice.reason for flag in flags)


@pytest.mark.parametrize("wanted", ["auto", "fp32", "bf16", "int8"])
def test_nothing_is_measured_on_a_cpu(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: {"avx2", "fma"})
    monkeypatch.setattr(machine, "seconds", lambda *_: pytest.fail("measured"))
    choice = choose_precision(wanted, CPU)
    assert choice.precision == ("fp32" if wanted == "auto" else wanted)
    assert wanted != "auto" or "no int8 instructions" in choice.reason


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


def test_a_model_is_spread_only_where_one_card_can_not_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, False, count=2, free=1000)
    assert not machine.spread(700, CUDA) and machine.spread(900, CUDA)
    assert not machine.spread(900, CPU)
    assert (machine.available_memory(CUDA), machine.available_memory(CUDA, spread=True)) == (1000, 2000)
    assert "Tesla T4, the first of 2 cards. To use all: torchrun --nproc-per-node 2" in machine.describe(CUDA)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not machine.spread(900, CUDA)
    assert "one of 2 processes" in machine.describe(CUDA)


@pytest.mark.parametrize(
    ("made_in", "on", "bf16", "found"),
    [("fp16", CPU, True, "fp32"), ("bf16", CUDA, False, "fp16"), ("int8", MPS, True, "fp32"),
     ("bf16", CPU, False, "bf16"), ("int8", CPU, False, "int8"), ("fp16", CUDA, True, "fp16")],
)  # fmt: skip
def test_a_run_from_elsewhere_goes_on_in_the_nearest_format(
    made_in: str, on: torch.device, bf16: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_card(monkeypatch, bf16)
    monkeypatch.setattr(host, "cpu_flags", lambda: {"avx2"})
    choice = machine.nearest_precision(made_in, on)
    assert choice.precision == found
    assert (made_in in choice.reason) == (found != made_in)


@pytest.mark.parametrize(
    ("cuda", "said", "told"),
    [("13.0", "The NVIDIA driver on your system is too old (found version 11040)", "its driver is too old: update it"),
     ("13.0", "", "torch finds no working driver"), (None, "", "is built without CUDA")],
)  # fmt: skip
def test_a_card_that_torch_can_not_use_is_told(
    cuda: str | None, said: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def available() -> bool:
        if said:
            warnings.warn(said, stacklevel=1)
        return False

    there = [True]
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: there[0] if "nvidia" in str(self) else exists(self))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert told in machine.describe(CPU)
    there[0] = False
    assert "NVIDIA" not in machine.describe(CPU)


def test_what_a_device_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, False)
    for wanted, on in (("fp16", CPU), ("bf16", CUDA), ("int8", MPS)):
        with pytest.raises(RecipeError, match="precision: .*(Use|use)"):
            choose_precision(wanted, on)
    assert choose_precision("int8", CPU).precision == "int8"


def test_rates_are_measured_on_this_machine() -> None:
    machine.gemm_rate.cache_clear()
    rates = machine.gemm_rates(CPU)
    assert {"int8", "bf16", "fp32"} <= rates.keys() and min(rates.values()) > 0


def test_a_slow_format_is_measured_by_one_small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []

    def slow(function: object, on: torch.device) -> float:
        calls.append(function)
        now[0] += 10.0
        return 10.0

    monkeypatch.setattr(machine, "seconds", slow)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    machine.gemm_rate.cache_clear()
    rates = machine.gemm_rates(CPU)
    machine.gemm_rate.cache_clear()
    assert len(calls) == len(rates) == 3
    assert rates["int8"] == pytest.approx(2e-9 * 32 * 2048**2 / 10)
