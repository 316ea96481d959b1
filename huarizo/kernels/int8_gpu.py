"""The products of a frozen int8 linear layer on an NVIDIA GPU: launches of the kernels in Triton (int8_triton.py).

A layer's forward product takes two launches, and its input gradient three. Tensor cores read 8-bit operands only with
the depth contiguous, so the gradient needs the weight transposed. It is transposed into scratch memory in each call,
which takes a few percent of the product's time at thousands of tokens; a second copy would double the weight's memory.
Nothing waits for the GPU, no shape depends on data, and the sizes of tiles come from a table, so few variants compile.
Shapes: T tokens, K input and N output channels, k float channels, K' and N' padded to whole blocks; r a LoRA's rank.
"""

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from huarizo.kernels.operations import operation
from huarizo.wording import first_line

BLOCK = 32  # channels that are rotated together
WHOLE = 8192  # length of a row that is quantised without reading it twice
AT_ONCE = 4096  # numbers that a program quantises at once, of longer rows or of several shorter ones
ROWS_AT_ONCE = 16  # at most
GROUP = 8  # tiles below each other that run together
SQUARE = 64  # of a weight, transposed by a program
FEW = 32  # tokens that get the smallest tile
OLDEST = (8, 0)  # compute capability whose int8 tensor cores Triton uses
DEVICES = ("cuda", "cpu")  # on a CPU in Triton's interpreter only


class Tile(NamedTuple):
    """What a program of a product computes: the size of its result, and its depth at a time; and by how much."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


LARGE = Tile(128, 128, 128, 8, 4), Tile(128, 64, 128, 4, 4), Tile(64, 64, 128, 4, 4), Tile(16, 64, 128, 4, 4)
MEDIUM = Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 4, 3), Tile(64, 64, 128, 4, 4), Tile(16, 64, 128, 4, 4)
SMALL = Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(16, 64, 128, 4, 3)
TILES = {(12, 0): SMALL, (9, 0): LARGE, (8, 6): SMALL, OLDEST: MEDIUM}
"""The tiles of a product from a compute capability on, the largest first; the last is for FEW tokens. They follow the
shared memory of a multiprocessor: 228 KB in 9.0 and 10.0, 164 KB in 8.0, 100 KB in 8.6, 8.9 and 12.0."""


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why layers on this device with activations of this dtype can't be computed here; None if they can.

    The first call for a device and dtype compiles a kernel and runs it, so it must not be made while a compiler traces.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"there is no kernel for {dtype}"
    if device.type != "cuda":
        return None if device.type == "cpu" and _interpreted() else f"there is no kernel in Triton for {device.type}"
    return _missing_on(device, dtype)


@functools.cache
def _missing_on(device: torch.device, dtype: torch.dtype) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"Triton does not multiply int8 on compute capability {capability[0]}.{capability[1]}"
    try:
        quantise(torch.ones(1, BLOCK, dtype=dtype, device=device), torch.ones(BLOCK, device=device))
    except Exception as error:  # no Triton, C compiler, Python.h or driver: each fails in its own way
        return f"Triton does not work here ({first_line(error)})"
    return None


@functools.cache
def _interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, with NumPy: the environment says so (TRITON_INTERPRET)."""
    try:
        return bool(importlib.import_module("triton").knobs.runtime.interpret)
    except ImportError:
        return False


@functools.cache
def _kernels() -> Any:
    """The module int8_triton.py, which can't be imported without Triton."""
    return importlib.import_module("huarizo.kernels.int8_triton")


@operation("int8_gpu_quantise", DEVICES)
def quantise(x: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows for `forward`: x [T, K] times input_scale, float32 [K], rotated, rounded to int8 with one scale per row.

    Returns int8 [T, K'] and the scales, float32 [T].
    """
    return _quantised(x, input_scale, gradient=False)


@torch.library.register_fake("huarizo::int8_gpu_quantise")
def _empty_rows(x: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, channels = x.shape
    rows = x.new_empty(tokens, -(-channels // BLOCK) * BLOCK, dtype=torch.int8)
    return rows, x.new_empty(tokens, dtype=torch.float32)


@operation("int8_gpu_forward", DEVICES)
def forward(
    quantised: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    float_channels: torch.Tensor,
    float_weight: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    h: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, N] in the dtype of x, from the results of `quantise`. weight: int8 [N', K']; scale: float32 [N'].

    x [T, K] is read only for the float channels; float_channels: int64 [k]; float_weight: [N, k]; bias: [N].
    h: [T, r] in the dtype of x, and up: float32 [N, r], of a LoRA: h up' is added.
    """
    out = x.new_empty(x.shape[0], outputs)
    h, up = (None if thin is None else thin.contiguous() for thin in (h, up))
    floats, rank = float_channels.shape[0], 0 if up is None else up.shape[1]
    thin = {"x": _with_whole_rows(x), "channels": float_channels, "float_weight": float_weight, "h": h, "up": up}
    _multiply(quantised, row_scale, weight, out, before=scale, bias=bias, FLOATS=floats, RANK=rank, **thin)
    return out


@torch.library.register_fake("huarizo::int8_gpu_forward")
def _(
    quantised: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    float_channels: torch.Tensor,
    float_weight: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    h: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], outputs)


@operation("int8_gpu_backward", DEVICES)
def backward(
    grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, inverse_smoothing: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, [T, K], in the dtype of grad [T, N]. weight, scale: as forward; inverse_smoothing: [K]."""
    out = grad.new_empty(grad.shape[0], inverse_smoothing.shape[0])
    _multiply(*quantise_gradient(grad, scale), transposed(weight), out, after=inverse_smoothing)
    return out


@torch.library.register_fake("huarizo::int8_gpu_backward")
def _(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, inverse_smoothing: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], inverse_smoothing.shape[0])


def quantise_gradient(grad: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [T, N], rotated, times scale, float32 [N'], rounded stochastically: int8 [T, N'] and scales, float32 [T]."""
    return _quantised(grad, scale, gradient=True)


def transposed(weight: torch.Tensor) -> torch.Tensor:
    """int8 [N', K'] -> [K', N'], contiguous."""
    (rows, columns), out = weight.shape, weight.new_empty(weight.shape[::-1])
    with _device_of(weight):
        _kernels().transpose[_count(rows, SQUARE), _count(columns, SQUARE)](weight, out, rows, columns, SQUARE, SQUARE)
    return out


def _quantised(x: torch.Tensor, factor: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, (rows, scales) = _with_whole_rows(x), _empty_rows(x, factor)
    (tokens, channels), padded = x.shape, rows.shape[1]
    if tokens:
        whole = padded <= WHOLE
        columns = 1 << (padded - 1).bit_length() if whole else AT_ONCE
        each = max(1, min(ROWS_AT_ONCE, AT_ONCE // columns))
        with _device_of(x):
            _kernels().quantise[(_count(tokens, each),)](
                x, factor, rows, scales, tokens, channels, padded, x.stride(0), gradient, whole, each, columns,
                num_warps=8 if each * columns >= AT_ONCE else 4, enable_fp_fusion=False,
            )  # fmt: skip
    return rows, scales


def _multiply(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, out: torch.Tensor,
    FLOATS: int = 0, RANK: int = 0, **of_layer: torch.Tensor | None,
) -> None:  # fmt: skip
    """Write a product to `out`. of_layer: the other tensors of the kernel, by name."""
    (tokens, depth), padded, x = rows.shape, weight.shape[0], of_layer.get("x")
    if not tokens:
        return
    tile = tile_for(rows.device, tokens, padded)
    at_once = tile.depth if depth % tile.depth == 0 else min(tile.depth, 64)
    names = ("before", "after", "x", "channels", "float_weight", "h", "up", "bias")
    with _device_of(rows):
        _kernels().product[(_count(tokens, tile.rows) * _count(padded, tile.columns),)](
            rows, row_scale, weight, out, *map(of_layer.get, names),
            tokens, out.shape[1], padded, depth, 0 if x is None else x.stride(0), FLOATS, RANK,
            THIN=16 if FLOATS + RANK <= 16 else 32, widened=_interpreted(), ROWS=tile.rows, COLUMNS=tile.columns,
            DEPTH=at_once, GROUP=GROUP, even=depth % at_once == 0, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def tile_for(device: torch.device, tokens: int, columns: int) -> Tile:
    """The largest tile of which a product [tokens, columns] has one for each multiprocessor, else the smallest."""
    tiles, processors = _tiles_of(device)
    if tokens <= FEW:
        return tiles[-1]
    enough = (t for t in tiles[:-1] if _count(tokens, t.rows) * _count(columns, t.columns) >= processors)
    return next(enough, tiles[-2])


@functools.cache
def _tiles_of(device: torch.device) -> tuple[tuple[Tile, ...], int]:
    """The tiles of a device and the number of its multiprocessors."""
    if device.type != "cuda":
        return LARGE, 1
    found = torch.cuda.get_device_properties(device)
    return next(TILES[oldest] for oldest in TILES if (found.major, found.minor) >= oldest), found.multi_processor_count


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the one on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _count(size: int, each: int) -> int:
    return -(-size // each)
