"""What this machine can do: device, memory, number formats; and the choices that follow from it.

Nothing decided here changes what is trained, only how fast. This is the one place, beside the hub's tokens, that reads
the environment.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from huarizo.errors import RecipeError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FixedPrecision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Choice:
    """A precision and the reason for it, in words for the user."""

    precision: FixedPrecision
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


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


def device() -> torch.device:
    """The device of this process: its CUDA card, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); without it bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(wanted: str, on: torch.device) -> Choice:
    """The number format of the frozen base.

    Raises:
        RecipeError: fp16 on a CPU, or bf16 on a card without it.
    """
    if on.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(on)
        best = Choice("bf16", f"{name} computes in bf16") if supported else Choice("fp16", f"{name} has no bf16")
    elif on.type == "cpu":
        supported = True
        fast = has_fast_bf16()
        best = (
            Choice("bf16", "this CPU has bf16 instructions")
            if fast
            else Choice("fp32", "this CPU has no bf16 instructions")
        )
    else:
        supported, best = True, Choice("fp32", f"{on.type} is used in fp32")
    if wanted == "auto":
        return best
    if wanted == "fp16" and on.type != "cuda":
        raise RecipeError("precision: fp16 needs an NVIDIA card. Use precision=auto, bf16 or fp32")
    if wanted == "bf16" and not supported:
        raise RecipeError("precision: this card has no bf16. Use precision=auto or fp16")
    return Choice(wanted, "as the recipe asks")  # pyright: ignore[reportArgumentType]


def available_memory(on: torch.device) -> int:
    """Bytes that are free for training: of the card, or of the machine (within a container's limit)."""
    if on.type == "cuda":
        return torch.cuda.mem_get_info(on)[0]
    free = 4 * 2**30
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except OSError:
        pass
    return max(free, 0)


def peak_memory(on: torch.device) -> int:
    """Bytes used at most so far: of the card, or by this process."""
    if on.type == "cuda":
        return torch.cuda.max_memory_allocated(on)
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def micro_batch_tokens(bytes_per_token: int, on: torch.device) -> int:
    """How many tokens to compute at once: as many as half of the free memory holds, within what still gains speed."""
    most = 16384 if on.type == "cuda" else 4096
    fits = available_memory(on) // 2 // max(bytes_per_token, 1)
    return max(256, min(most, fits // 256 * 256))
