"""Measures this machine for `huarizo doctor`, and estimates how fast it can train TinyLlama."""

import os
import platform
from importlib.metadata import version

import torch

from huarizo.machine import available_memory, describe, device, gemm_rates
from huarizo.model.compile import why_not
from huarizo.model.frozen.measure import int8_gain
from huarizo.plan import choose_precision

# Frozen linear weights of TinyLlama-1.1B: 22 layers of q, k, v, o, gate, up, down, and the output head.
TINYLLAMA_WEIGHTS = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632) + 32000 * 2048
FLOP_PER_TOKEN = 4 * TINYLLAMA_WEIGHTS  # forward and input gradient, 2 per multiply-add; no weight gradient
VERSIONS = ("huarizo", "torch", "transformers", "peft")


def diagnosis() -> dict[str, str]:
    """Lines to show, by title. Takes a few seconds to measure matrix products and to try the compiler."""
    on = device()
    rates = gemm_rates(on)
    choice = choose_precision("auto", on, int8_gain)
    reason = why_not(on)
    lines = {
        "device": describe(on),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "memory": f"{available_memory(on) / 1e9:.1f} GB free",
        "versions": ", ".join(f"{package} {version(package)}" for package in VERSIONS)
        + f", Python {platform.python_version()}",
        "compiler": f"none: {reason}; training runs uncompiled" if reason else "works: decoder layers are compiled",
        "precision": f"auto takes {choice.precision}",
    }
    for precision, rate in rates.items():
        limit = rate * 1e9 / FLOP_PER_TOKEN
        lines[f"{precision} products"] = f"{_shown(rate)} GFLOP/s: at most {_shown(limit)} tokens/s of TinyLlama"
    return lines


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"
