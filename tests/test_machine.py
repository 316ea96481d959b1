"""The choice of precision: what is fastest and right, with the reason in words."""

import pytest
import torch

from huarizo import host, machine
from huarizo.errors import RecipeError
from huarizo.machine import choose_precision

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def with_card(monkeypatch: pytest.MonkeyPatch, bf16: bool, rates: dict[str, float], count: int = 1) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(machine, "gemm_rates", lambda on: rates)


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
    monkeypatch.setattr(machine, "_seconds", lambda *_: pytest.fail("measured"))
    choice = choose_precision(wanted, CPU)
    assert choice.precision == ("fp32" if wanted == "auto" else wanted)
    assert wanted != "auto" or "no int8 instructions" in choice.reason


@pytest.mark.parametrize(
    ("bf16", "rates", "precision", "dtype"),
    [(True, {"int8": 1200.0, "bf16": 600.0}, "int8", torch.bfloat16),
     (True, {"int8": 700.0, "bf16": 600.0}, "bf16", torch.bfloat16),
     (True, {"bf16": 600.0}, "bf16", torch.bfloat16),
     (False, {"int8": 50.0, "fp16": 45.0, "fp32": 8.0}, "fp16", torch.float16),
     (False, {"int8": 90.0, "fp16": 45.0, "fp32": 8.0}, "int8", torch.float16)],
    ids=str,
)  # fmt: skip
def test_a_card_is_measured(
    bf16: bool, rates: dict[str, float], precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_card(monkeypatch, bf16, rates)
    choice = choose_precision("auto", CUDA)
    assert (choice.precision, choice.dtype) == (precision, dtype)


def test_several_cards_in_one_process_stay_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, True, {"int8": 1200.0, "bf16": 600.0}, count=2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert choose_precision("auto", CUDA).precision == "bf16"
    with pytest.raises(RecipeError, match="one card"):
        choose_precision("int8", CUDA)


def test_what_a_device_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, False, {})
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

    monkeypatch.setattr(machine, "_seconds", slow)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    machine.gemm_rate.cache_clear()
    rates = machine.gemm_rates(CPU)
    machine.gemm_rate.cache_clear()
    assert len(calls) == len(rates) == 3
    assert rates["int8"] == pytest.approx(2e-9 * 32 * 2048**2 / 10)
