"""The Triton kernels of an int8 layer without a GPU: run in Triton's interpreter, and compiled for cards of every generation."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo.kernels import int8_gpu
from huarizo.kernels.int8_gpu import AT_ONCE, GROUP, SQUARE, TILES, WHOLE, Tile

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_the_interpreter_computes_what_the_cpu_does() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    tests, environment = "tests/kernels/interpreted_int8.py", os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def tiles_of(capability: int) -> tuple[Tile, ...]:
    return next(TILES[oldest] for oldest in TILES if divmod(capability, 10) >= oldest)


def registers(
    kernel: Any, capability: int, signature: dict[str, str], constants: dict[str, Any], **options: Any
) -> str:
    """What cuobjdump says that a compiled kernel needs. Pointers and sizes are multiples of 16."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in signature and name != "count_rows"
    }
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    cubin = Path(knobs.cache.dir) / "kernel.cubin"
    cubin.write_bytes(compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def product(capability: int, tile: Tile, dtype: str, forward: bool) -> str:
    from huarizo.kernels import int8_triton

    x = f"*{dtype}"
    sizes = dict.fromkeys(("count_rows", "outputs", "padded", "depth", "x_stride"), "i32")
    signature = {"left": "*i8", "left_scale": "*fp32", "right": "*i8", "out": x} | sizes
    thin = {"before": "*fp32", "x": x, "channels": "*i64", "float_weight": x, "h": x, "up": "*fp32", "bias": x}
    signature |= thin if forward else {"after": "*fp32"}
    constants = {name: None for name in (*thin, "after") if name not in signature}
    constants |= {"FLOATS": 8, "RANK": 8} if forward else {"FLOATS": 0, "RANK": 0}
    constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "GROUP": GROUP}
    constants |= {"THIN": 16, "widened": False, "even": True}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return registers(int8_triton.product, capability, signature, constants, **options)


def quantise(capability: int, dtype: str, gradient: bool, whole: bool) -> str:
    from huarizo.kernels import int8_triton

    signature = {"x": f"*{dtype}", "factor": "*fp32", "out": "*i8", "scales": "*fp32"}
    signature |= dict.fromkeys(("count_rows", "count", "padded", "stride"), "i32")
    constants = {"gradient": gradient, "whole": whole, "ROWS": 1, "COLUMNS": WHOLE if whole else AT_ONCE}
    options = {"num_warps": 8, "enable_fp_fusion": False}
    return registers(int8_triton.quantise, capability, signature, constants, **options)


def transpose(capability: int) -> str:
    from huarizo.kernels import int8_triton

    signature = {"weight": "*i8", "out": "*i8", "rows": "i32", "columns": "i32"}
    return registers(int8_triton.transpose, capability, signature, {"ROWS": SQUARE, "COLUMNS": SQUARE})


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is compiled here is not kept."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@needs_triton
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_the_largest_product_keeps_its_sums_in_registers(capability: int) -> None:
    needs = product(capability, tiles_of(capability)[0], "bf16", forward=True)
    assert "REG:" in needs and "STACK:0" in needs and "LOCAL:0" in needs


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_every_kernel_compiles_without_spills(capability: int) -> None:
    makes = [
        functools.partial(product, capability, tile, "bf16", way)
        for tile in tiles_of(capability)
        for way in (True, False)
    ]
    makes += [
        functools.partial(quantise, capability, "bf16", *how) for how in ((True, True), (True, False), (False, True))
    ]
    for make in [*makes, functools.partial(transpose, capability)]:
        needs = make()
        assert "STACK:0" in needs and "LOCAL:0" in needs, make


def test_the_largest_tile_that_fills_the_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_gpu, "_tiles_of", lambda device: (int8_gpu.LARGE, 132))
    sizes = {
        (tokens, columns): int8_gpu.tile_for(torch.device("cuda"), tokens, columns)[:2]
        for tokens, columns in ((1, 2048), (32, 256), (33, 2048), (1024, 256), (1024, 2048), (4096, 2048), (16384, 256))
    }
    assert list(sizes.values()) == [(16, 64), (16, 64), (64, 64), (64, 64), (128, 64), (128, 128), (128, 128)]


def test_other_devices_and_dtypes_are_told_why() -> None:
    assert "float64" in str(int8_gpu.reason_against(torch.device("cuda"), torch.float64))
    assert "cpu" in str(int8_gpu.reason_against(torch.device("cpu"), torch.bfloat16))
    assert "mps" in str(int8_gpu.reason_against(torch.device("mps"), torch.bfloat16))


def test_a_gpu_that_can_not_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    missing, card = int8_gpu._missing_on.__wrapped__, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(missing(card, torch.float16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in str(missing(card, torch.float16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))

    def without_a_compiler(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC")

    monkeypatch.setattr(int8_gpu, "quantise", without_a_compiler)
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: None)
    assert missing(card, torch.float16) == "Triton does not work here (Failed to find C compiler.)"
