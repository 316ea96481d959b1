"""The instruction sets that the kernels are written for, and which of them this CPU has.

Every tier compiles the same sources; only a header with the same functions (isa/) differs. A tier's flags are those of
`huarizo.host.cpu_flags`. Its options tell gcc and clang to use exactly these instructions, so a library of a lower tier
can be built, tested and used on every higher CPU.
"""

import functools
import platform
from dataclasses import dataclass

from huarizo.host import cpu_flags


@dataclass(frozen=True, kw_only=True)
class Tier:
    """An instruction set, with what the kernels get from it."""

    name: str
    machine: str
    """x86_64 or aarch64."""
    needs: frozenset[str]
    """Flags of a CPU that has it."""
    options: tuple[str, ...]
    """Of the compiler."""
    int8_product: str | None
    """The instruction that multiplies int8; None if no kernel does."""
    bf16: bool = False
    """Whether it multiplies bf16. Other tiers round bf16 in software."""


AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
AVX2_OPTIONS = ("-mavx2", "-mfma", "-mf16c", "-mtune=haswell")
AVX512_OPTIONS = (
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mtune=skylake-avx512", "-mprefer-vector-width=512"),
)

TIERS = (
    Tier(
        name="avx512_vnni_bf16", machine="x86_64", needs=AVX512 | {"avx512_vnni", "avx512_bf16"},
        options=(*AVX512_OPTIONS, "-mavx512vnni", "-mavx512bf16"), int8_product="vpdpbusd, 512 bit", bf16=True,
    ),
    Tier(
        name="avx512_vnni", machine="x86_64", needs=AVX512 | {"avx512_vnni"},
        options=(*AVX512_OPTIONS, "-mavx512vnni"), int8_product="vpdpbusd, 512 bit",
    ),
    Tier(
        name="avx512", machine="x86_64", needs=AVX512, options=AVX512_OPTIONS, int8_product="vpmaddwd, 512 bit",
    ),
    Tier(
        name="avx_vnni", machine="x86_64", needs=AVX2 | {"avx_vnni"},
        options=(*AVX2_OPTIONS, "-mavxvnni"), int8_product="vpdpbusd, 256 bit",
    ),
    Tier(
        name="avx2", machine="x86_64", needs=AVX2, options=AVX2_OPTIONS, int8_product="vpmaddwd, 256 bit",
    ),
    Tier(
        name="neon_i8mm", machine="aarch64", needs=frozenset({"asimd", "asimddp", "i8mm", "bf16"}),
        options=("-march=armv8.2-a+dotprod+i8mm+bf16",), int8_product="smmla",
    ),
    Tier(
        name="neon_dotprod", machine="aarch64", needs=frozenset({"asimd", "asimddp"}),
        options=("-march=armv8.2-a+dotprod",), int8_product="sdot",
    ),
    Tier(name="neon", machine="aarch64", needs=frozenset({"asimd"}), options=("-march=armv8-a",), int8_product=None),
)  # fmt: skip
"""The best first."""


@functools.cache
def tiers() -> tuple[Tier, ...]:
    """The tiers of this CPU, the best first; none if it has no vector instructions that the kernels know."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return tuple(tier for tier in TIERS if tier.machine == machine and tier.needs <= cpu_flags())


def torch_int8() -> list[str]:
    """This CPU's instructions with which torch multiplies int8 (`_int_mm`).

    Without any, torch's int8 product takes hundreds of times as long as one in fp32 and must not be called.
    """
    return sorted({"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_flags())


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware, by its best tier or AMX; without it bf16 is slower than fp32."""
    return any(tier.bf16 for tier in tiers()[:1]) or "amx_bf16" in cpu_flags()
