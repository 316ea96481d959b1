"""Other CPUs than this one, for tests: their flags, their best tier, and whether its kernels can be compiled."""

import ctypes
from dataclasses import dataclass

import pytest
import torch

from huarizo import doctor, plan
from huarizo.kernels import attention, build, dropout, int8, tiers

TIERS_NOW = tiers.tiers.__wrapped__  # not remembered from one CPU to the next


@dataclass(frozen=True)
class Cpu:
    machine: str
    flags: frozenset[str]


def _with_tier(name: str, *more: str) -> Cpu:
    tier = next(tier for tier in tiers.TIERS if tier.name == name)
    return Cpu(tier.machine, tier.needs | set(more))


AVX2, AVX512, VNNI = _with_tier("avx2"), _with_tier("avx512"), _with_tier("avx512_vnni_bf16")
AMX = _with_tier("avx512_vnni_bf16", "amx_int8", "amx_bf16")
PI_4, PI_5, APPLE = _with_tier("neon"), _with_tier("neon_dotprod"), _with_tier("neon_i8mm")
NO_COMPILER = "no C compiler: none of cc, gcc, clang is on the PATH. Install one: apt install g++"


def pretend(
    monkeypatch: pytest.MonkeyPatch, cpu: Cpu, missing: str | None = None, compiled_for: str | None = None
) -> None:
    """Let huarizo see another CPU. Nothing can be computed by its kernels.

    missing: why they can't be compiled; compiled_for: a lower tier than the CPU's best, which is the default.
    """
    monkeypatch.setattr(tiers, "cpu_flags", lambda: cpu.flags)
    monkeypatch.setattr(tiers.platform, "machine", lambda: cpu.machine)
    found = TIERS_NOW()
    for module in (tiers, build, plan, doctor):
        monkeypatch.setattr(module, "tiers", lambda: found)
    tier = next((tier for tier in found if compiled_for in (None, tier.name)), None)
    missing = missing or (None if tier else "this CPU has no vector instructions that the kernels know")
    library = build.Library(ctypes.CDLL(None), tier, openmp=True) if tier and not missing else str(missing)

    def against_int8(dtype: torch.dtype) -> str | None:
        if "amx_int8" in cpu.flags:
            return "torch uses this CPU's AMX, which multiplies faster"
        return missing if missing or (tier and tier.int8_product) else "this CPU has no int8 product"

    monkeypatch.setattr(int8, "reason_against", against_int8)
    for kernel in (attention, dropout):
        monkeypatch.setattr(kernel, "reason_against", lambda *_: missing)
    for kernel in (int8, attention, dropout):
        monkeypatch.setattr(kernel, "library", lambda: library)
