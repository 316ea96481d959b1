"""What the operating system reports about this process and machine. Does not import torch, so it loads fast."""

import functools
import os
import platform
from pathlib import Path


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
    """The CPU's feature flags as the kernel reports them; empty if it reports none."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return frozenset()


def cpu_name() -> str:
    """The CPU's name, with its vector and matrix instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = text.partition("model name")[2].partition("\n")[0].strip("\t :") or platform.machine()
    except OSError:
        name = platform.processor() or platform.machine()
    flags = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"})
    return f"{name} ({', '.join(flags)})" if flags else name


def int8_instructions() -> list[str]:
    """This CPU's int8 multiply instructions. Without any, int8 products are slower than fp32."""
    return sorted({"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_flags())


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); without it bf16 is slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
