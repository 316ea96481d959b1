"""Tiers: the best first, each with flags in Linux's spelling and with options that compilers take."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from huarizo.kernels import build, tiers
from huarizo.kernels.tiers import TIERS, Tier
from tests.cpus import AMX, APPLE, AVX2, AVX512, PI_4, PI_5, TIERS_NOW, VNNI, Cpu, pretend

MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
CROSS = {"aarch64": "aarch64-linux-gnu-gcc", "x86_64": "x86_64-linux-gnu-gcc"}


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compilers_take_its_options(compiler: str, tier: Tier, tmp_path: Path) -> None:
    """Whether this CPU has the tier or not: an empty file is only compiled."""
    program = compiler if tier.machine == MACHINE else CROSS[tier.machine] if compiler == "gcc" else ""
    if not shutil.which(program):
        pytest.skip(f"no {compiler} for {tier.machine}")
    source = tmp_path / "empty.c"
    source.write_text("int one(void) { return 1; }\n")
    command = [program, *build.FLAGS, *build.OWN_THREADS, *tier.options, "-Werror", str(source), "-o", f"{source}.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_they_have_names_of_their_own_and_flags_as_linux_spells_them() -> None:
    assert len({tier.name for tier in TIERS}) == len(TIERS)
    for tier in TIERS:
        assert tier.machine in ("x86_64", "aarch64")
        assert tier.needs and all(re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)?", flag) for flag in tier.needs)


def test_the_best_come_first() -> None:
    """No tier comes before one that needs more, so the first that a CPU has is its best."""
    for number, tier in enumerate(TIERS):
        for later in TIERS[number + 1 :]:
            assert later.machine != tier.machine or not later.needs > tier.needs


@pytest.mark.parametrize(
    ("cpu", "names"),
    [
        (AVX2, ["avx2"]),
        (AVX512, ["avx512", "avx2"]),
        (VNNI, ["avx512_vnni_bf16", "avx512_vnni", "avx512", "avx2"]),
        (Cpu("AMD64", VNNI.flags | {"avx_vnni"}), ["avx512_vnni_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2"]),
        (Cpu("x86_64", AVX2.flags | {"avx_vnni"}), ["avx_vnni", "avx2"]),
        (Cpu("x86_64", frozenset({"avx2", "fma"})), []),
        (Cpu("arm64", APPLE.flags), ["neon_i8mm", "neon_dotprod", "neon"]),
        (PI_5, ["neon_dotprod", "neon"]),
        (PI_4, ["neon"]),
        (Cpu("riscv64", frozenset({"v"})), []),
    ],
)
def test_a_cpu_has_its_tier_and_those_below(cpu: Cpu, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cpu)
    assert [tier.name for tier in TIERS_NOW()] == names


def test_what_torch_multiplies_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, int8, bf16 in (
        (AVX2, [], False), (AVX512, [], False), (VNNI, ["avx512_vnni"], True), (PI_5, [], False), (APPLE, [], False),
        (AMX, ["amx_int8", "avx512_vnni"], True), (Cpu("x86_64", frozenset({"amx_bf16"})), [], True),
        (Cpu("x86_64", AVX2.flags | {"avx_vnni"}), ["avx_vnni"], False),
    ):  # fmt: skip
        pretend(monkeypatch, cpu)
        assert (tiers.torch_int8(), tiers.has_fast_bf16()) == (int8, bf16), cpu
