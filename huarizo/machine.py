"""This machine's device and memory, and the precisions it supports and how fast they are.

`huarizo.plan` decides what a run makes of them. Apart from `host` and the hub's tokens, this is the only module that
reads environment variables.
"""

import atexit
import ctypes
import functools
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from huarizo.host import cache_folder, cpu_name, rank, world_size
from huarizo.kernels.tiers import has_fast_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FixedPrecision = Literal["int8", "bf16", "fp16", "fp32"]
MEASURING = 1.0  # seconds to measure one precision, at most
MEASURED = 2048  # input and output channels of a measured product
ROOM = 0.8  # share of a GPU's free memory that a model's weights may take
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # in malloc.h
# share of the GEMM rate that whole steps reach, measured on models of 135 million to 1.1 billion weights
REACHED = 0.35, 0.8


def device() -> torch.device:
    """The device of this process: its CUDA GPU, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def float_precision(on: torch.device) -> FixedPrecision:
    """The fastest float precision that this device supports in hardware."""
    if on.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if on.type == "cpu" and has_fast_bf16() else "fp32"


@functools.cache
def gemm_rate(precision: FixedPrecision, on: torch.device, budget: float = MEASURING) -> float:
    """Measure torch's matrix product in a float precision: GFLOP/s, at 2 operations per multiply-add.

    For int8 see `huarizo.model.frozen.measure`: torch's own product can take minutes on a CPU.
    """
    dtype = DTYPES[precision]
    right = torch.ones(MEASURED, MEASURED, dtype=dtype, device=on)

    def product(rows: int) -> Callable[[], object]:
        return partial(torch.mm, torch.ones(rows, MEASURED, dtype=dtype, device=on), right)

    return rate(product, on, budget)


def rate(product: Callable[[int], Callable[[], object]], on: torch.device, budget: float) -> float:
    """Measure a product of [rows, MEASURED] and [MEASURED, MEASURED]: GFLOP/s, at 2 operations per multiply-add.

    With up to 512 rows on a CPU and 4,096 on a GPU. Takes about `budget` seconds at most: rows grow until a call is
    slow.

    product: prepares the product of a number of rows, and returns what computes it.
    """
    ends = time.perf_counter() + budget
    multiply, rows, taken = product(1), 1, 0.0
    multiply()  # loads libraries
    for rows in (8, 64, 512) if on.type == "cpu" else (512, 4096):
        multiply = product(rows)
        taken = seconds(multiply, on)
        if taken > budget / 8:
            break
    while time.perf_counter() + taken < ends:
        taken = min(taken, seconds(multiply, on))
    return 2e-9 * rows * MEASURED**2 / taken


def minutes_in_float(operations: float, precision: FixedPrecision, on: torch.device) -> tuple[float, float]:
    """Estimate how long this many operations of training take in a float precision: the least and most minutes."""
    rate = gemm_rate(precision, on, budget=0.3) * 1e9
    return operations / (rate * REACHED[1]) / 60, operations / (rate * REACHED[0]) / 60


def seconds(function: Callable[[], object], on: torch.device) -> float:
    began = time.perf_counter()
    function()
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter() - began


def spread(needed: int, on: torch.device) -> bool:
    """Whether a model with `needed` bytes of weights must be spread over all GPUs, because one can't hold it.

    Never under torchrun, where each process has its own GPU.
    """
    several = on.type == "cuda" and world_size() == 1 and torch.cuda.device_count() > 1
    return several and needed > ROOM * available_memory(on)


def from_first(make: Callable[[], str], on: torch.device) -> str:
    """The text that `make` returns in the first process, in all processes. Only the first one calls it."""
    if world_size() == 1:
        return make()
    from accelerate import PartialState

    PartialState(cpu=on.type != "cuda")
    atexit.register(_leave_group)
    content = torch.tensor(list(make().encode() if rank() == 0 else b""), dtype=torch.uint8, device=on)
    length = torch.tensor(len(content), device=on)
    torch.distributed.broadcast(length, 0)
    content = content if rank() == 0 else torch.empty(int(length), dtype=torch.uint8, device=on)
    torch.distributed.broadcast(content, 0)
    return bytes(content.tolist()).decode()


def _leave_group() -> None:
    """Stop the threads of the process group. A process that exits while they still run can abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def name_of(on: torch.device) -> str:
    """Identifies a device across machines: its type, its name, and a CPU's instructions."""
    return f"{on.type}: {torch.cuda.get_device_name(on) if on.type == 'cuda' else cpu_name()}"


def describe(on: torch.device, needed: int = 0) -> str:
    """Describe the device for the user: its name, other GPUs, and why a GPU is not used.

    needed: bytes of the model's weights.
    """
    if on.type != "cuda":
        return f"{name_of(on)}{_unused_card()}"
    name, cards = f"{on}: {torch.cuda.get_device_name(on)}", torch.cuda.device_count()
    if world_size() > 1:
        return f"{name}, one of {world_size()} processes"
    if cards == 1:
        return name
    if spread(needed, on):
        return f"{name} and {cards - 1} more, because the model doesn't fit on one"
    return f"{name}, the first of {cards} GPUs. To use all: torchrun --nproc-per-node {cards} -m huarizo train ..."


def _unused_card() -> str:
    """Why torch can't use an NVIDIA GPU whose driver is installed; "" if there is none."""
    driver = Path("/proc/driver/nvidia/version")
    if not driver.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    if torch.version.cuda is None:
        return f". The NVIDIA GPU is not used: torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    warning = next((str(warning.message) for warning in caught), "")
    cause = "its driver is too old: update it" if "too old" in warning else "torch finds no working driver"
    return (
        f". The NVIDIA GPU is not used: {cause}, or install a torch for it (this one needs CUDA {torch.version.cuda})"
    )


def moved(tensor: torch.Tensor, on: torch.device) -> torch.Tensor:
    """The tensor on a device. A copy to an NVIDIA GPU waits for nothing: the CPU goes on while it is under way."""
    if on.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(on)
    return tensor.contiguous().pin_memory().to(on, non_blocking=True)


def keep_compiled_code() -> None:
    """Let torch cache compiled code in our cache folder for the next run, unless the user chose another.

    torch's default is under /tmp, and torch sets the environment variable to it as soon as anything reads it.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "compiled")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is allocated next: the tensors of a training step are those of the last.

    By default it returns them to the system, and the page faults of new ones take 3 % of a step. Without glibc nothing
    changes.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never trims
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def available_memory(on: torch.device, spread: bool = False) -> int:
    """Free memory in bytes: of the GPU, of all GPUs (`spread`), or of the machine or its container."""
    if spread:
        return sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
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
    """Peak memory in bytes so far: of the GPU, or of this process."""
    if on.type == "cuda":
        return torch.cuda.max_memory_allocated(on)
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that GPU or machine ran out of memory. On a CPU, only torch's message tells."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )
