"""What is known of the device: its name, its memory, and how fast its number formats are."""

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from huarizo import machine

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def with_card(monkeypatch: pytest.MonkeyPatch, bf16: bool, count: int = 1, free: int = 10**9) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda on: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda on: "Tesla T4")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_a_model_is_spread_only_where_one_card_can_not_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, False, count=2, free=1000)
    assert not machine.spread(700, CUDA) and machine.spread(900, CUDA)
    assert not machine.spread(900, CPU)
    assert (machine.available_memory(CUDA), machine.available_memory(CUDA, spread=True)) == (1000, 2000)
    assert "Tesla T4, the first of 2 GPUs. To use all: torchrun --nproc-per-node 2" in machine.describe(CUDA)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not machine.spread(900, CUDA)
    assert "one of 2 processes" in machine.describe(CUDA)


@pytest.mark.parametrize(
    ("cuda", "said", "told"),
    [("13.0", "The NVIDIA driver on your system is too old (found version 11040)", "its driver is too old: update it"),
     ("13.0", "", "torch finds no working driver"), (None, "", "is built without CUDA")],
)  # fmt: skip
def test_a_card_that_torch_can_not_use_is_reported(
    cuda: str | None, said: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def available() -> bool:
        if said:
            warnings.warn(said, stacklevel=1)
        return False

    there = [True]
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: there[0] if "nvidia" in str(self) else exists(self))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert told in machine.describe(CPU)
    there[0] = False
    assert "NVIDIA" not in machine.describe(CPU)


def test_a_rate_is_measured_on_this_machine() -> None:
    machine.gemm_rate.cache_clear()
    assert machine.gemm_rate("fp32", CPU, budget=0.05) > 0
    machine.gemm_rate.cache_clear()


@pytest.mark.parametrize(("each", "rows"), [(10.0, [1, 8]), (0.0625, [1, 8, 64, 512])], ids=["slow", "fast"])
def test_a_slow_product_is_measured_with_few_rows(
    each: float, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = [0.0], []

    def wait(function: object, on: torch.device) -> float:
        now[0] += each
        return each

    def product(count: int) -> Callable[[], object]:
        asked.append(count)
        return lambda: None

    monkeypatch.setattr(machine, "seconds", wait)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    found = machine.rate(product, CPU, budget=1.0)
    assert asked == rows and now[0] <= max(1.0, each), "within the budget, but for one call"
    assert found == pytest.approx(2e-9 * rows[-1] * 2048**2 / each)


def test_all_processes_get_the_text_of_the_first_and_leave_their_group(tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(
        "import atexit, torch\n"
        "from huarizo.host import rank\n"
        "from huarizo.machine import from_first\n"
        f"def leave(): open(f'{tmp_path}/{{rank()}}', 'a').write(f'|{{torch.distributed.is_initialized()}}')\n"
        "atexit.register(leave)  # runs after what from_first registers\n"
        "texts = [from_first(lambda: text * (rank() == 0), torch.device('cpu')) for text in ('', 'llama 라마')]\n"
        f"open(f'{tmp_path}/{{rank()}}', 'w').write('|'.join(texts))\n"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ask.py"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / name).read_text() for name in "01"] == ["|llama 라마|False"] * 2


IN_ROUNDS = """
import resource, torch
from huarizo.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**20) for _ in range(32)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    ended = subprocess.run([sys.executable, "-c", IN_ROUNDS], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 2**15 / 4, "a quarter of the pages of 32 tensors"
