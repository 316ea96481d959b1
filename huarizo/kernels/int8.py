"""The products of a frozen int8 linear layer in C (int8.c), for bf16 and fp32.

Only pointers and strides are passed to C. The results are bit-identical for any number of threads, which is torch's.
Shapes: T tokens, K input and N output channels, k float channels. The reference is huarizo/model/frozen/int8.py.
"""

import ctypes
import functools

import torch
import torch.nn.functional as F

from huarizo.host import cpu_flags
from huarizo.kernels import build
from huarizo.kernels.call import address, run
from huarizo.kernels.operations import operation

LINE = 64  # bytes of a cache line
COLUMNS = 32  # of a panel
WORD = 4  # bytes that are multiplied together


class Call(ctypes.Structure):
    """`Call` in int8.c. Strides are in bytes."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("floats", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("quantised_stride", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("quantised", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("row_start", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("float_channels", ctypes.c_void_p),
        ("float_weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("h", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def library() -> build.Library | str:
    """The library compiled from int8.c, or the reason why there is none."""
    return build.load("int8", Call, multiplies_int8=True)


@functools.cache
def reason_against(dtype: torch.dtype) -> str | None:
    """Why layers with activations of this dtype can't be computed in C; None if they can."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"there is no kernel for {dtype}"
    if "amx_int8" in cpu_flags():
        return "torch uses this CPU's AMX, which multiplies faster"
    found = library()
    return found if isinstance(found, str) else None


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K], int8 or float, in C's layout: panels of 32 rows, interleaved in words of 32 bits.

    Returns [N / 32, K / e, 32, e] with e elements per word; N and K are padded with zeros to multiples of 32 and e.
    Integers become uint8 by adding 128.
    """
    each = WORD // weight.element_size()
    weight = F.pad(weight, (0, -weight.shape[1] % each, 0, -weight.shape[0] % COLUMNS))
    rows, columns = weight.shape
    panels = weight.view(rows // COLUMNS, COLUMNS, columns // each, each).transpose(1, 2).contiguous()
    return panels.view(torch.uint8).bitwise_xor_(128) if weight.dtype == torch.int8 else panels


def unpacked(weight: torch.Tensor, outputs: int | None = None, inputs: int | None = None) -> torch.Tensor:
    """The inverse of `packed`: the weight, cut to [outputs, inputs] if given, which removes the padding."""
    panels, words, columns, each = weight.shape
    weight = weight.transpose(1, 2).reshape(panels * columns, words * each)[:outputs, :inputs]
    return (weight ^ 128).view(torch.int8) if weight.dtype == torch.uint8 else weight


def stride_of(channels: int) -> int:
    """Bytes from one quantised row to the next: an odd number of cache lines, so that rows spread over cache sets."""
    return -(-channels // LINE) * LINE | LINE


@operation("int8_quantise")
def quantise(x: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows for `forward`: x [T, K] times input_scale, float32 [K], rotated, rounded to int8 with one scale per row.

    Returns int8 [T, stride_of(K)], padded with zeros; the scales, float32 [T]; the initial value of the row's sums,
    int32 [T].
    """
    quantised, row_scale, row_start = _empty_rows(x, input_scale)
    rows = {"quantised": quantised, "row_scale": row_scale, "row_start": row_start}
    _run("int8_quantise", x, x.shape[1], 0, **rows, factor=input_scale)
    return quantised, row_scale, row_start


@torch.library.register_fake("huarizo::int8_quantise")
def _empty_rows(x: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    quantised = x.new_empty(x.shape[0], stride_of(x.shape[1]), dtype=torch.int8)
    return quantised, x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.int32)


@operation("int8_forward")
def forward(
    quantised: torch.Tensor,
    row_scale: torch.Tensor,
    row_start: torch.Tensor,
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
    """[T, N] in the dtype of x, from the results of `quantise`. weight: `packed` int8; scale: float32 [N padded].

    x [T, K] is read only for the float channels; float_channels: int64 [k]; float_weight: `packed`; bias: [N].
    h: [T, r] in the dtype of x, and up: float32 [N, r], of a LoRA: h up' is added.
    """
    out = x.new_empty(x.shape[0], outputs)
    rows = {"quantised": quantised, "row_scale": row_scale, "row_start": row_start}
    floats = {"float_channels": float_channels, "float_weight": float_weight}
    low_rank = {"h": None if h is None else h.contiguous(), "up": None if up is None else up.contiguous()}
    of_layer = {"weight": weight, "scale": scale, "bias": bias, **floats}
    _run("int8_forward", x, x.shape[1], outputs, **rows, **of_layer, **low_rank, out=out)
    return out


@torch.library.register_fake("huarizo::int8_forward")
def _(
    quantised: torch.Tensor,
    row_scale: torch.Tensor,
    row_start: torch.Tensor,
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


@operation("int8_backward")
def backward(
    grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, inverse_smoothing: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, [T, K], in the dtype of grad [T, N]. weight, scale: as forward; inverse_smoothing: [K]."""
    out = grad.new_empty(grad.shape[0], inverse_smoothing.shape[0])
    sizes = inverse_smoothing.shape[0], grad.shape[1]
    _run("int8_backward", grad, *sizes, weight=weight, scale=scale, factor=inverse_smoothing, out=out)
    return out


@torch.library.register_fake("huarizo::int8_backward")
def _(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, inverse_smoothing: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], inverse_smoothing.shape[0])


def _run(function: str, x: torch.Tensor, inputs: int, outputs: int, **tensors: torch.Tensor | None) -> None:
    """inputs, outputs: K and N; tensors: the fields of `Call` that the function reads or writes."""
    x = x if x.stride(1) == 1 else x.contiguous()  # keeps it alive until C returns
    rows, float_channels = x.shape[0], tensors.get("float_channels")
    floats = 0 if float_channels is None else float_channels.shape[0]
    up = tensors.get("up")
    rank = 0 if up is None else up.shape[1]
    if not inputs or (not outputs and function != "int8_quantise"):
        raise ValueError(f"{function} wants channels, not {inputs} inputs and {outputs} outputs")
    panels, each, stride = -(-outputs // COLUMNS), WORD // x.element_size(), stride_of(inputs)
    wanted = {
        "quantised": (torch.int8, rows, stride),
        "row_scale": (torch.float32, rows),
        "row_start": (torch.int32, rows),
        "weight": (torch.uint8, panels, -(-inputs // COLUMNS) * COLUMNS // WORD, COLUMNS, WORD),
        "scale": (torch.float32, panels * COLUMNS),
        "factor": (torch.float32, inputs),
        "float_channels": (torch.int64, floats),
        "float_weight": (x.dtype, panels, -(-floats // each), COLUMNS, each),
        "bias": (x.dtype, outputs),
        "h": (x.dtype, rows, rank),
        "up": (torch.float32, outputs, rank),
        "out": (x.dtype, rows, inputs if function == "int8_backward" else outputs),
    }
    call = Call(
        rows=rows, inputs=inputs, outputs=outputs, floats=floats, x_stride=x.stride(0) * x.element_size(),
        quantised_stride=stride, x=x.data_ptr(), bf16=x.dtype == torch.bfloat16, threads=torch.get_num_threads(),
        rank=rank,
        **{name: address(function, tensor, *wanted[name]) for name, tensor in tensors.items()},
    )  # fmt: skip
    run(library(), function, call)
