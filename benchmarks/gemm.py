"""How fast this machine multiplies matrices of a model's own shapes, by dtype: the ceiling of a training step.

    python benchmarks/gemm.py MODEL_FOLDER TOKENS

In goes a model folder and the tokens of a step, out comes one JSON object of 10^9 operations a second, two a
multiply-add. A step with a frozen base computes two products of every linear: the layer's output and its input's
gradient. Each is timed in both memory layouts of its right-hand side, and the faster one counts, for a ceiling should
not hang on a choice. It runs in a process of its own between the rounds of `train_speed.py`, because Linux counts a
parent's memory towards the peak of the processes that it starts.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from huarizo.kernels import build, int8
from huarizo.kernels.build import Library
from huarizo.machine import float_precision
from huarizo.model.frozen.int8 import int8_product
from huarizo.model.frozen.measure import product_rate

SLOW = 50  # 10^9 operations a second, below which a format is no ceiling and one small product tells its rate
QUEUED = 20  # products that a card gets at once, so that their launches don't count
REPEATS = 10  # after one to warm up; the best counts, for a ceiling is what the machine can do undisturbed
DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def linears(config: dict[str, Any]) -> Counter[tuple[int, int]]:
    """(input, output) channels of a decoder layer's linears, and how many there are of each."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    query, key = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    shapes = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
    return Counter([*shapes, (hidden, inner), (hidden, inner), (inner, hidden)])


def flop_per_token(config: dict[str, Any], labelled: float) -> float:
    """Forward and input gradient of a frozen base, two operations a multiply-add; the head at labelled tokens only."""
    layer = sum(k * n * count for (k, n), count in linears(config).items())
    head = config["hidden_size"] * config["vocab_size"]
    return 4 * layer * config["num_hidden_layers"] + 4 * head * labelled


def filled(dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
    return values if dtype == torch.int8 else values.to(dtype) / 127


def seconds(product: Callable[[], object], device: torch.device) -> float:
    taken, queued = [], QUEUED if device.type == "cuda" else 1
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        for _ in range(queued):
            product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - began) / queued)
    return min(taken[1:])


def product_seconds(dtype: torch.dtype, rows: int, k: int, n: int, device: torch.device) -> float:
    """[rows, k] times [k, n], with the right-hand side as it is or as a transposed view, whichever is faster."""
    multiply = int8_product if dtype == torch.int8 else torch.mm
    left, right = filled(dtype, rows, k, device), filled(dtype, k, n, device)
    layouts = (right, right.t().contiguous().t())
    return min(seconds(lambda: multiply(left, layout), device) for layout in layouts)  # noqa: B023


def int8_peak(library: Library) -> float:
    """The rate of the kernel's int8 instructions on operands in the closest cache (int8_peak.c)."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "int8_peak")
        flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")] + [*library.tier.options, "-pthread"]
        source = Path(__file__).with_name("int8_peak.c")
        subprocess.run(
            [build.find_compiler() or "cc", *flags, source, "-o", program, "-lm"],
            check=True,
        )
        return float(subprocess.run([program, str(torch.get_num_threads())], capture_output=True, check=True).stdout)


def gflops(config: dict[str, Any], tokens: int, device: torch.device) -> dict[str, float]:
    """By dtype, weighted by the operations of each shape. A dtype that the device can't multiply is absent.

    A slow one (bf16 on a CPU without bf16 instructions) is measured for a second at most. int8 on a CPU with a kernel
    is `int8_peak`, for the kernel's own products are part of what is judged.
    """
    rates: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        if name == "fp16" and device.type == "cpu":
            continue
        operations = taken = 0.0
        library = int8.library() if name == "int8" and device.type == "cpu" else ""
        if isinstance(library, Library) and int8.reason_against(DTYPES[float_precision(device)]) is None:
            rates[name] = int8_peak(library)
            continue
        try:
            if (rate := product_rate(name, device)) < SLOW:
                rates[name] = rate
                continue
            for (k, n), count in linears(config).items():
                for inner, outer in ((k, n), (n, k)):  # forward, input gradient
                    taken += count * product_seconds(dtype, tokens, inner, outer, device)
                    operations += count * 2 * tokens * k * n
        except (RuntimeError, NotImplementedError) as error:
            print(f"{name} products are left out: {error}", file=sys.stderr)
            continue
        rates[name] = 1e-9 * operations / taken
    return rates


if __name__ == "__main__":
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(gflops(json.loads(Path(sys.argv[1], "config.json").read_text()), int(sys.argv[2]), where)))
