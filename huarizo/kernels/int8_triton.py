"""The kernels of a frozen int8 linear layer for NVIDIA GPUs, in Triton; int8_gpu.py launches them.

They compute what int8.c does on a CPU, in the same order, so that both give the same integers: a rotation is sums and
differences of channels 1, 2, 4, 8 and 16 apart, a scale is the largest magnitude, compared by its bits, times 1 / 127,
and a row with a NaN or an infinity gets the scale NaN. The reference is huarizo/model/frozen/int8.py.

Integers are multiplied by tensor cores, which read 8-bit operands only with the depth contiguous. Sums of float32 must
not be fused with products where a result is rounded to an integer: `quantise` is launched with enable_fp_fusion=False.

Triton compiles these functions or, in its interpreter, runs them with NumPy. That adds int32 in int64, which `_wrapped`
undoes and the compiler removes.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(32)  # channels that are rotated together
SMALLEST = tl.constexpr(1e-12)
INFINITY = tl.constexpr(0x7F800000)  # its bits
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: a small number plus it is rounded to an integer, ties to even


@triton.jit
def _wrapped(sums, dtype: tl.constexpr):
    return sums.to(tl.int64).to(dtype)


@triton.jit
def _pairs(x, axis: tl.constexpr):
    """Sum and difference of each pair along an axis of size 2 of a tensor with six axes, float32.

    A partner is the pair's sum minus the number itself, in the bits as integers: exact, and compiled to a copy.
    """
    bits = x.to(tl.int32, bitcast=True)
    partner = _wrapped(tl.sum(bits, axis, keep_dims=True) - bits, tl.int32).to(tl.float32, bitcast=True)
    sign = tl.reshape(1.0 - 2.0 * tl.arange(0, 2), [1] * axis + [2] + [1] * (5 - axis))
    return x * sign + partner


@triton.jit
def _rotated(x, rows: tl.constexpr, columns: tl.constexpr):
    """Blocks of BLOCK columns times the Hadamard matrix: float32 [rows, columns], columns a multiple of BLOCK."""
    x = tl.reshape(x, [rows * columns // BLOCK, 2, 2, 2, 2, 2])
    for axis in tl.static_range(5, 0, -1):
        x = _pairs(x, axis)
    return tl.reshape(x, [rows, columns])


@triton.jit
def _scaled(
    x, factor, rows, stride, at, count, padded, gradient: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows as they are quantised, [ROWS, COLUMNS], from the columns `at`; zeros beyond `padded`."""
    z = tl.load(x + rows[:, None] * stride + at[None, :], mask=at[None, :] < count, other=0.0).to(tl.float32)
    if gradient:
        return _rotated(z, ROWS, COLUMNS) * tl.load(factor + at, mask=at < padded, other=0.0)[None, :]
    return _rotated(z * tl.load(factor + at, mask=at < count, other=0.0)[None, :], ROWS, COLUMNS)


@triton.jit
def _fourth_powers_above_zero(z, at):
    """The sum of n^4 over the columns n above zero, modulo 2^32, of each row."""
    n = at.to(tl.uint32)
    return _wrapped(tl.sum(tl.where(z > 0, (n * n * n * n)[None, :], 0), 1), tl.uint32)


@triton.jit
def _noise(at, scale, signs):
    """As `_noise` of the reference: [rows, columns] for columns [columns], scales and sums of signs [rows]."""
    start = (scale.to(tl.int32, bitcast=True).to(tl.uint32) >> 8) * 0x85EBCA6B + signs * 0x27D4EB2F
    number = start[:, None] + at.to(tl.uint32)[None, :] * 0x9E3779B9
    return (number >> 9).to(tl.int32).to(tl.float32) * (1.0 / 8388608.0)


@triton.jit
def _stored(z, scale, signs, out, rows, at, padded, gradient: tl.constexpr):
    """Round rows z with these scales and store them at the columns `at`."""
    z = z * tl.div_rn(tl.zeros_like(scale) + 1.0, scale)[:, None]
    if gradient:
        z = tl.minimum(tl.maximum(tl.floor(z + _noise(at, scale, signs)), -128.0), 127.0)
    else:
        z = (z + NEAREST) - NEAREST
    tl.store(out + rows[:, None] * padded + at[None, :], z.to(tl.int8), mask=at[None, :] < padded)


@triton.jit(do_not_specialize=["count_rows"])
def quantise(
    x, factor, out, scales, count_rows, count, padded, stride,
    gradient: tl.constexpr, whole: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of x times factor, rotated, rounded to nearest; or, a gradient, rotated, times factor, rounded at random.

    x: [count_rows, count], its rows `stride` apart; factor: float32 [count], of a gradient [padded]; out: int8
    [count_rows, padded]; scales: float32 [count_rows]. Rows of up to COLUMNS are read once (whole), longer ones twice.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)) % count_rows
    rows, columns = rows.to(tl.int64), tl.arange(0, COLUMNS)
    top = tl.zeros([ROWS], tl.int32)
    signs = tl.zeros([ROWS], tl.uint32)
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, COLUMNS if whole else padded, COLUMNS):
        at = start + columns
        z = _scaled(x, factor, rows, stride, at, count, padded, gradient, ROWS, COLUMNS)
        top = tl.maximum(top, tl.max(tl.abs(z).to(tl.int32, bitcast=True), 1))
        if gradient:
            signs += _fourth_powers_above_zero(z, at)
    scale = tl.maximum(top.to(tl.float32, bitcast=True), SMALLEST) * (1.0 / 127)
    scale = tl.where(top < INFINITY, scale, float("nan"))
    tl.store(scales + rows, scale)
    if whole:
        _stored(z, scale, signs, out, rows, columns, padded, gradient)
    else:
        for start in range(0, padded, COLUMNS):
            at = start + columns
            z = _scaled(x, factor, rows, stride, at, count, padded, gradient, ROWS, COLUMNS)
            _stored(z, scale, signs, out, rows, at, padded, gradient)


@triton.jit
def transpose(weight, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [columns, rows] from weight [rows, columns], int8."""
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tile = tl.load(weight + i[:, None] * columns + j[None, :], mask=inside, other=0)
    tl.store(out + j[:, None] * rows + i[None, :], tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def _tile(count_rows, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The rows and columns of a program's tile. GROUP tiles below each other run together, and share what they read."""
    down, across = tl.cdiv(count_rows, ROWS), tl.cdiv(padded, COLUMNS)
    each = GROUP * across
    first = tl.program_id(0) // each * GROUP
    high = tl.minimum(down - first, GROUP)
    row = first + tl.program_id(0) % each % high
    column = tl.program_id(0) % each // high
    return row * ROWS + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _integers(left, right, rows, columns, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
              even: tl.constexpr):  # fmt: skip
    """Rows of left times rows of right, both int8 with `depth` contiguous: int32 [ROWS, COLUMNS]."""
    k = tl.arange(0, DEPTH)
    left += rows[:, None] * depth + k[None, :]
    right += columns[None, :] * depth + k[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, depth, DEPTH):
        if even:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=k[None, :] < depth - start, other=0)
            b = tl.load(right, mask=k[:, None] < depth - start, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        left += DEPTH
        right += DEPTH
    return sums


@triton.jit
def _thin(y, x, channels, float_weight, h, up, rows, columns, outputs, x_stride,
          FLOATS: tl.constexpr, RANK: tl.constexpr, THIN: tl.constexpr, widened: tl.constexpr):  # fmt: skip
    """y plus x_F F' + h up', as one product of depth FLOATS + RANK in steps of THIN."""
    inside = (columns < outputs)[None, :]
    for start in range(0, FLOATS + RANK, THIN):
        f = start + tl.arange(0, THIN)
        floats = f < FLOATS
        channel = tl.load(channels + f, mask=floats, other=0)
        left = tl.load(x + rows[:, None] * x_stride + channel[None, :], mask=floats[None, :], other=0.0)
        right = tl.load(float_weight + columns[None, :] * FLOATS + f[:, None], mask=floats[:, None] & inside, other=0.0)
        if RANK > 0:
            r = f - FLOATS
            of_rank = (r >= 0) & (r < RANK)
            of_h = tl.load(h + rows[:, None] * RANK + r[None, :], mask=of_rank[None, :], other=0.0)
            of_up = tl.load(up + columns[None, :] * RANK + r[:, None], mask=of_rank[:, None] & inside, other=0.0)
            left = tl.where(floats[None, :], left, of_h)
            right = tl.where(floats[:, None], right, of_up.to(right.dtype))
        if widened:
            left, right = left.to(tl.float32), right.to(tl.float32)
        y = tl.dot(left, right, y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["count_rows"])
def product(
    left, left_scale, right, out, before, after, x, channels, float_weight, h, up, bias,
    count_rows, outputs, padded, depth, x_stride, FLOATS: tl.constexpr, RANK: tl.constexpr, THIN: tl.constexpr,
    widened: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    even: tl.constexpr,
):  # fmt: skip
    """out = rotate(left right' * left_scale * before) * after + x_F F' + h up' + bias, [count_rows, outputs].

    left: int8 [count_rows, depth]; left_scale: float32 [count_rows]; right: int8 [padded, depth]; before: float32
    [padded]; after: float32 [outputs]; x: [count_rows, K]; channels: int64 [FLOATS]; float_weight: [outputs, FLOATS];
    h: [count_rows, RANK]; up: float32 [outputs, RANK]; bias: [outputs]. All but left, left_scale, right and out may be
    None. even: DEPTH divides depth. widened: thin products are in float32, as the interpreter has none in bf16.
    """
    rows, columns = _tile(count_rows, padded, ROWS, COLUMNS, GROUP)
    row, column = (rows % count_rows).to(tl.int64), (columns % padded).to(tl.int64)
    y = _integers(left, right, row, column, depth, ROWS, COLUMNS, DEPTH, even).to(tl.float32)
    y = y * tl.load(left_scale + row)[:, None]
    if before is not None:
        y = y * tl.load(before + column)[None, :]
    y = _rotated(y, ROWS, COLUMNS)
    if after is not None:
        y = y * tl.load(after + column, mask=column < outputs, other=0.0)[None, :]
    if FLOATS + RANK > 0:
        y = _thin(
            y, x, channels, float_weight, h, up, row, column, outputs, x_stride, FLOATS, RANK, THIN, widened
        )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    inside = (rows < count_rows)[:, None] & (columns < outputs)[None, :]
    tl.store(out + row[:, None] * outputs + column[None, :], y.to(out.dtype.element_ty), mask=inside)
