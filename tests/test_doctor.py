"""The doctor names the CPU's tier, the state of each kernel and the rate of each product, with what they mean."""

import threading
from dataclasses import replace

import pytest
import torch

from huarizo import doctor
from huarizo.kernels import attention, dropout, int8
from tests.cpus import AMX, AVX2, NO_COMPILER, PI_4, VNNI, Cpu, pretend

RATES = {"int8": 190.0, "bf16": 20.0, "fp32": 95.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(doctor, "product_rates", lambda on, budget: RATES)
    monkeypatch.setattr(doctor, "why_not", lambda on: None)


def test_a_cpu_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, AVX2)
    lines = doctor.diagnosis()
    assert lines["tier"] == "avx2: int8 with vpmaddwd, 256 bit, bf16 rounded in software"
    assert {lines[f"{name} in C"] for name in ("int8", "attention", "dropout")} == {"compiled, on torch's threads"}
    assert lines["precision"] == "auto takes int8: this CPU multiplies int8 with vpmaddwd, 256 bit (tier avx2)"
    assert lines["int8 products"] == "190 GFLOP/s in C: at most 46 tokens/s of TinyLlama"
    assert lines["bf16 products"] == "20 GFLOP/s: at most 4.8 tokens/s of TinyLlama"
    assert lines["fp32 products"] == "95 GFLOP/s: at most 23 tokens/s of TinyLlama"


def test_a_compiler_that_knows_less_than_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, VNNI, compiled_for="avx2")
    library = int8.library()
    assert not isinstance(library, str)
    monkeypatch.setattr(dropout, "library", lambda: replace(library, openmp=False))
    monkeypatch.setattr(attention, "reason_against", lambda *_: "it is broken")
    lines = doctor.diagnosis()
    assert lines["tier"].startswith("avx512_vnni_bf16: int8 with vpdpbusd, 512 bit, bf16 in hardware")
    assert lines["int8 in C"] == "compiled for avx2, the best tier that this compiler knows, on torch's threads"
    assert lines["dropout in C"].endswith("on threads of its own (the compiler has no OpenMP that torch shares)")
    assert lines["attention in C"] == "it is broken"


@pytest.mark.parametrize(
    ("cpu", "missing", "precision", "tier", "kernel", "product"),
    [
        (AVX2, NO_COMPILER, "fp32", "avx2: ", NO_COMPILER, "in torch, as exact products in fp32"),
        (PI_4, None, "fp32", "neon: no int8 instructions", "no int8 product", "in torch, as exact products in fp32"),
        (AMX, None, "int8", "avx512_vnni_bf16: ", "torch uses this CPU's AMX", "in torch:"),
        (Cpu("x86_64", frozenset()), None, "fp32", "none: this CPU has no vector", "this CPU has no", "in fp32"),
    ],
    ids=["no compiler", "no int8", "amx", "no tier"],
)  # fmt: skip
def test_a_cpu_without_an_int8_kernel(
    cpu: Cpu, missing: str | None, precision: str, tier: str, kernel: str, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cpu, missing)
    lines = doctor.diagnosis()
    assert lines["precision"].startswith(f"auto takes {precision}: ")
    assert lines["tier"].startswith(tier) and kernel in lines["int8 in C"] and product in lines["int8 products"]


def test_a_card_has_no_kernels_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "device", lambda: torch.device("mps"))
    lines = doctor.diagnosis()
    assert "tier" not in lines and "int8 in C" not in lines
    assert lines["fp32 products"] == "95 GFLOP/s: at most 23 tokens/s of TinyLlama"


def test_the_doctor_does_not_wait_for_a_slow_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(doctor, "PATIENCE", 0.1)
    monkeypatch.setattr(doctor, "why_not", lambda on: released.wait(60) and None)
    assert doctor.diagnosis()["compiler"].startswith("not known after 0 seconds")
    released.set()
    monkeypatch.setattr(doctor, "PATIENCE", 60)
    assert doctor.diagnosis()["compiler"] == "works: decoder layers are compiled"
