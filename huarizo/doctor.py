"""Measures this machine for `huarizo doctor`, and estimates how fast it can train TinyLlama."""

import os
import platform
import threading
import time
from collections.abc import Callable
from importlib.metadata import version

import torch

from huarizo.kernels import attention, dropout, int8
from huarizo.kernels.build import Library
from huarizo.kernels.libraries import libraries
from huarizo.kernels.tiers import tiers, torch_int8
from huarizo.machine import DTYPES, available_memory, describe, device, float_precision
from huarizo.model.compile import why_not
from huarizo.model.frozen.measure import int8_gain, product_rates
from huarizo.plan import choose_precision

# Frozen linear weights of TinyLlama-1.1B: 22 layers of q, k, v, o, gate, up, down, and the output head.
TINYLLAMA_WEIGHTS = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632) + 32000 * 2048
FLOP_PER_TOKEN = 4 * TINYLLAMA_WEIGHTS  # forward and input gradient, 2 per multiply-add; no weight gradient
OWN_THREADS = "threads of its own (the compiler has no OpenMP that torch shares)"
HEAD_SIZE = 64  # of TinyLlama
BUDGET = 0.4  # seconds to measure one precision's product
PATIENCE = 7.0  # seconds to wait for torch's compiler
VERSIONS = ("huarizo", "torch", "transformers", "peft")


def diagnosis() -> dict[str, str]:
    """Lines to show, by title. Takes seconds: kernels are compiled while torch's compiler is tried, then measured."""
    on = device()
    compiler = _tried_beside(on)
    kernels = libraries("int8") if on.type == "cpu" else {}
    compilation = compiler()  # over before products are measured: it would take a core from them
    rates = product_rates(on, BUDGET)
    choice = choose_precision("auto", on, int8_gain)
    lines = {
        "device": describe(on),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "memory": f"{available_memory(on) / 1e9:.1f} GB free",
        "versions": ", ".join(f"{package} {version(package)}" for package in VERSIONS)
        + f", Python {platform.python_version()}",
        "compiler": compilation,
        **(_kernel_lines(kernels) if on.type == "cpu" else {}),
        "precision": f"auto takes {choice.precision}: {choice.reason}",
    }
    for precision, rate in rates.items():
        limit = rate * 1e9 / FLOP_PER_TOKEN
        lines[f"{precision} products"] = (
            f"{_shown(rate)} GFLOP/s{_of(precision, on)}: at most {_shown(limit)} tokens/s of TinyLlama"
        )
    return lines


def _tried_beside(on: torch.device) -> Callable[[], str]:
    """Try torch's compiler in a thread. The result waits for it, until PATIENCE is over, and says how it went."""
    outcome: list[str | None] = []
    trial = threading.Thread(target=lambda: outcome.append(why_not(on)), daemon=True)
    ends = time.perf_counter() + PATIENCE
    trial.start()

    def describe_outcome() -> str:
        trial.join(max(0.0, ends - time.perf_counter()))
        if not outcome:
            return f"not known after {PATIENCE:.0f} seconds of trying; a run tries it for longer"
        return f"none: {outcome[0]}; training runs uncompiled" if outcome[0] else "works: decoder layers are compiled"

    return describe_outcome


def _kernel_lines(kernels: dict[str, Library | str]) -> dict[str, str]:
    """This CPU's tier, and the state of each kernel."""
    dtype, best = DTYPES[float_precision(torch.device("cpu"))], next(iter(tiers()), None)
    if best is None:
        lines = {"tier": "none: this CPU has no vector instructions that the kernels know"}
    else:
        product = f"int8 with {best.int8_product}" if best.int8_product else "no int8 instructions"
        lines = {"tier": f"{best.name}: {product}, bf16 {'in hardware' if best.bf16 else 'rounded in software'}"}
    against = {
        "int8": int8.reason_against(dtype),
        "attention": attention.reason_against(dtype, HEAD_SIZE),
        "dropout": dropout.reason_against(dtype),
    }
    for name, library in kernels.items():
        lines[f"{name} in C"] = against[name] or _state(library)
    return lines


def _state(library: Library | str) -> str:
    if isinstance(library, str):
        return library
    lower = f" for {library.tier.name}, the best tier that this compiler knows" if library.tier != tiers()[0] else ""
    threads = "torch's threads" if library.openmp else OWN_THREADS
    return f"compiled{lower}, on {threads}"


def _of(precision: str, on: torch.device) -> str:
    """Whose product was measured, where it isn't torch's own in this precision."""
    if precision != "int8" or on.type != "cpu":
        return ""
    if int8.reason_against(DTYPES[float_precision(on)]) is None:
        return " in C"
    return " in torch" if torch_int8() else " in torch, as exact products in fp32"


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"
