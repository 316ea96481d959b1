"""What the operating system says of this process and this machine. It loads no torch, so it answers at once."""

import functools
import os
import platform
from pathlib import Path


def rank() -> int:
    """Number of this process among those that torchrun started; 0 for a single one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def cache_folder() -> Path:
    """Where prepared models and tokens are kept: $XDG_CACHE_HOME/huarizo, if absolute, or ~/.cache/huarizo."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "huarizo"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the kernel says that this CPU can do; empty where it says nothing."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return frozenset()


def cpu_name() -> str:
    """The processor's name, with the matrix instructions that it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = text.partition("model name")[2].partition("\n")[0].strip("\t :") or platform.machine()
    except OSError:
        name = platform.processor() or platform.machine()
    flags = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"})
    return f"{name} ({', '.join(flags)})" if flags else name


def int8_instructions() -> list[str]:
    """The instructions of this CPU that multiply int8; without one of them such products are slower than fp32's."""
    return sorted({"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_flags())


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); without it bf16 is slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
