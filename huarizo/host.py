"""What the operating system reports about this process and machine. Does not import torch, so it loads fast."""

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

NAMED = {
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16",
}  # fmt: skip
"""Flags that are shown with a CPU's name."""
MAC_ARM_FLAGS = {
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
}
MAC_X86_FLAGS = {"AVX512VNNI": "avx512_vnni", "AVX512BF16": "avx512_bf16"}
"""Those that Linux does not spell as macOS does in lower case."""
ARM_CORES = {
    ("0x41", "0xd03"): "Cortex-A53", ("0x41", "0xd07"): "Cortex-A57", ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76", ("0x41", "0xd0c"): "Neoverse-N1", ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd49"): "Neoverse-N2", ("0x41", "0xd4f"): "Neoverse-V2",
}  # fmt: skip
"""Common ones by CPU implementer and CPU part of /proc/cpuinfo."""


SPINS = "5000"
"""Turns, about a tenth of a millisecond, that an idle thread of GNU's OpenMP takes before it sleeps."""


def spin_briefly() -> None:
    """Let idle threads of torch's OpenMP sleep soon, unless the user set how they wait. Torch must not be loaded yet.

    By default they spin for milliseconds. Beside another busy process they then keep a core from the thread that they
    wait for, at each of a thousand waits in a training step: an int8 layer took 7 times as long. On an idle machine it
    makes no difference.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def rank() -> int:
    """The rank of this process under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def cache_folder() -> Path:
    """The folder for prepared models and tokens: $XDG_CACHE_HOME/huarizo if absolute, else ~/.cache/huarizo."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "huarizo"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The CPU's features in Linux's spelling (avx2, avx512_vnni; asimddp, i8mm); empty if the system reports none."""
    if sys.platform == "darwin":
        return _mac_flags(_sysctl())
    return frozenset(" ".join(_cpuinfo(key) for key in ("flags", "Features")).split())  # of x86; of ARM


def cpu_name() -> str:
    """The CPU's name, with its vector and matrix instructions."""
    name = _sysctl().get("machdep.cpu.brand_string", "") if sys.platform == "darwin" else _cpuinfo("model name")
    name = name or _arm_name() or platform.processor() or platform.machine()
    flags = sorted(cpu_flags() & NAMED)
    return f"{name} ({', '.join(flags)})" if flags else name


def _cpuinfo(key: str) -> str:
    """The first value of a key in /proc/cpuinfo; "" if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _arm_name() -> str:
    """The name of an ARM core by the numbers that Linux reports; "" on another CPU."""
    maker, part = _cpuinfo("CPU implementer"), _cpuinfo("CPU part")
    return ARM_CORES.get((maker, part), f"ARM core {part} of maker {maker}") if maker and part else ""


@functools.cache
def _sysctl() -> dict[str, str]:
    """What macOS reports of its CPU, by name. An Intel Mac has no hw.optional.arm, which is not an error."""
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "machdep.cpu", "hw.optional.arm"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in done.stdout.splitlines())}


def _mac_flags(values: dict[str, str]) -> frozenset[str]:
    """The flags that Linux would report, from those of macOS."""
    if platform.machine() == "arm64":
        return frozenset({"asimd"} | {flag for name, flag in MAC_ARM_FLAGS.items() if values.get(name) == "1"})
    names = " ".join(values.get(f"machdep.cpu.{group}", "") for group in ("features", "leaf7_features"))
    return frozenset(MAC_X86_FLAGS.get(name, name.lower()) for name in names.split())
