"""The int8 products in C: equal to the definition in huarizo/model/frozen/int8.py, and the same bytes on any number of threads."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from huarizo.kernels import int8 as kernel
from huarizo.model.frozen.int8 import BLOCK, Int8Linear, quantise, reference, reference_gradient, rotated
from huarizo.model.frozen.linear import LowRank

SHAPES = [(64, 64), (65, 33), (33, 65), (1, 1), (3, 2), (130, 16), (576, 192), (192, 576), (257, 95), (2048, 256)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _kernel() -> Iterator[None]:
    """Skips where the kernel can't be had; leaves the number of threads as it was."""
    if reason := kernel.reason_against(torch.bfloat16):
        pytest.skip(reason)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layer_of(
    inputs: int, outputs: int, dtype: torch.dtype, floats: int | None = None, bias: bool = False
) -> Int8Linear:
    torch.manual_seed(inputs + outputs)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    if floats is None:
        return quantise([linear], torch.rand(inputs) + 0.5)[0]
    inverse = torch.rand(inputs) + 0.5
    channels = torch.randperm(inputs)[:floats].sort().values
    return Int8Linear(linear, inverse.index_fill(0, channels, 0), inverse, channels)


def backward(layer: Int8Linear, grad: torch.Tensor) -> torch.Tensor:
    return kernel.backward(grad, layer.weight, layer.scale, layer.inverse_smoothing)


def check(layer: Int8Linear, tokens: int) -> None:
    """Both products, to the rounding of the dtype.

    A value within fp32's precision of halfway between two integers may go either way: a few such, a step each.
    """
    x, grad = torch.randn(tokens, layer.in_features), torch.randn(tokens, layer.out_features)
    x, grad = x.to(layer.dtype), grad.to(layer.dtype)
    tolerance = 3e-3 if layer.dtype == torch.bfloat16 else 2e-3
    for actual, expected in ((layer(x), reference(x, layer)), (backward(layer, grad), reference_gradient(grad, layer))):
        assert actual.dtype == layer.dtype
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 15, 16, 31, 63, 64, 65, 100, 576, 2048])
def test_quantised_rows(channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, input_scale = torch.randn(7, channels).to(dtype), torch.rand(channels) + 0.1
    quantised, scale, start = kernel.quantise(x, input_scale)
    z = rotated(x.double() * input_scale)
    assert quantised.shape == (7, kernel.stride_of(channels)) and not quantised[:, z.shape[1] :].any()
    assert torch.allclose(scale.double() * 127, z.abs().amax(1), rtol=1e-6)
    integers = quantised[:, : z.shape[1]].double()
    assert ((integers - z / scale[:, None].double()).abs() <= 0.5 + 1e-4).all()
    assert torch.equal(start, -128 * quantised.int().sum(1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [5, 12, 17, 77])
def test_products_of_any_shape(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    check(layer_of(*shape, dtype, bias=tokens % 2 == 1), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", range(1, 21))
def test_few_tokens(tokens: int, dtype: torch.dtype) -> None:
    check(layer_of(100, 70, dtype, bias=True), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("floats", [0, 1, 5, 32, 33, 64])
def test_any_number_of_float_channels(floats: int, dtype: torch.dtype) -> None:
    check(layer_of(150, 71, dtype, floats, bias=True), 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(dtype: torch.dtype) -> None:
    layer = layer_of(65, 33, dtype)
    x, grad = torch.randn(50, 200).to(dtype)[:, 31:96], torch.randn(50, 99).to(dtype)[:, 3:36]
    turned = torch.randn(65, 50).to(dtype).t()
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert torch.equal(layer(turned), layer(turned.contiguous()))
    assert torch.equal(backward(layer, grad), backward(layer, grad.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channel", [0, 1, 63, 99])
def test_a_row_with_a_nan_is_nan_and_no_other(channel: int, value: float, dtype: torch.dtype) -> None:
    layer = layer_of(100, 70, dtype)
    x, grad = torch.randn(40, 100).to(dtype), torch.randn(40, 70).to(dtype)
    clean = layer(x), backward(layer, grad)
    x[2, channel] = value
    grad[2, channel % 70] = value
    others = torch.arange(40) != 2
    for before, after in zip(clean, (layer(x), backward(layer, grad)), strict=True):
        assert torch.equal(before[others], after[others])
        assert after[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_no_rows(dtype: torch.dtype) -> None:
    layer = layer_of(100, 70, dtype)
    assert not layer(torch.zeros(6, 100, dtype=dtype)).any()
    assert not backward(layer, torch.zeros(6, 70, dtype=dtype)).any()
    assert layer(torch.zeros(0, 100, dtype=dtype)).shape == (0, 70)
    assert backward(layer, torch.zeros(0, 70, dtype=dtype)).shape == (0, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(65, 33), (100, 700), (576, 192), (512, 512)])
@pytest.mark.parametrize("tokens", [1, 16, 50, 201])
def test_any_number_of_threads_gives_the_same_bytes(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = layer_of(*shape, dtype)
    x, grad = torch.randn(tokens, shape[0]).to(dtype), torch.randn(tokens, shape[1]).to(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append((layer(x), backward(layer, grad)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("shape", [(64, 32), (2048, 96), (96, 2048), (5632, 64)])
def test_sums_are_exact(shape: tuple[int, int]) -> None:
    """Extreme integers and a rotation undone: fp32 holds a sum of 2^24, and what is larger is rounded once."""
    torch.manual_seed(3)
    inputs, outputs = shape
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    rows = torch.randint(-127, 128, (9, kernel.stride_of(inputs)), dtype=torch.int8)
    rows[:, inputs:] = 0
    rows[0, :inputs], rows[1, :inputs], weight[0], weight[1] = 127, -127, -128, 127
    start = -128 * rows.int().sum(1, dtype=torch.int32)
    x, nothing, empty = torch.zeros(9, inputs), torch.empty(0, dtype=torch.int64), torch.empty(outputs, 0)
    panels = kernel.packed(weight), torch.ones(outputs), x, nothing, kernel.packed(empty), None, outputs
    y = kernel.forward(rows, torch.ones(9), start, *panels)
    expected = rows[:, :inputs].double() @ weight.double().t()
    assert torch.allclose(rotated(y.double()) / BLOCK, expected, rtol=0, atol=2.0 if inputs > 1000 else 0)


def test_a_packed_weight_comes_back() -> None:
    for weight in (
        torch.randint(-128, 128, (96, 64), dtype=torch.int8),
        torch.randn(95, 7),
        torch.randn(3, 5).bfloat16(),
    ):
        assert torch.equal(kernel.unpacked(kernel.packed(weight), *weight.shape), weight)


def test_what_does_not_fit_is_refused() -> None:
    layer = layer_of(64, 32, torch.float32)
    with pytest.raises(ValueError, match=r"int8_backward wants torch.uint8 \(2, "):
        backward(layer, torch.randn(3, 33))
    with pytest.raises(ValueError, match="int8_quantise wants torch.float32"):
        layer(torch.randn(3, 65))
    assert "float16" in str(kernel.reason_against(torch.float16))


def test_other_cpus_leave_the_products_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "cpu_flags", lambda: {"avx512_vnni", "amx_int8"})
    assert "AMX" in str(kernel.reason_against.__wrapped__(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_does_the_same_without_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = layer_of(100, 70, dtype, bias=True)
    monkeypatch.setattr(kernel, "reason_against", lambda dtype: "not in this test")
    theirs = layer_of(100, 70, dtype, bias=True)
    assert theirs.weight.dtype == torch.int8 and ours.weight.dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(ours.plain(), theirs.plain(), strict=True))
    assert torch.equal(ours.dequantised(), theirs.dequantised())
    x, grad = torch.randn(2, 40, 100).to(dtype), torch.randn(2, 40, 70).to(dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = [layer(leaf) for layer, leaf in zip((ours, theirs), leaves, strict=True)]
    for out in outs:
        out.backward(grad)
    for a, b in ((outs[0], outs[1]), (leaves[0].grad, leaves[1].grad)):
        assert a is not None and b is not None
        assert (a.double() - b.double()).norm() <= 5e-3 * b.double().norm()


def test_the_compiler_sees_the_right_shapes() -> None:
    layer = layer_of(65, 33, torch.float32)
    x = torch.randn(4, 65)
    rows = kernel.quantise(x, layer.input_scale)
    torch.library.opcheck(torch.ops.huarizo.int8_quantise.default, (x, layer.input_scale))
    floats = layer.float_channels, layer.float_weight, None, 33
    torch.library.opcheck(torch.ops.huarizo.int8_forward.default, (*rows, layer.weight, layer.scale, x, *floats))
    grad = torch.randn(4, 33), layer.weight, layer.scale, layer.inverse_smoothing
    torch.library.opcheck(torch.ops.huarizo.int8_backward.default, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(65, 33), (64, 64), (100, 700)])
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 33])
def test_the_term_of_a_lora_is_added(rank: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = layer_of(*shape, dtype, bias=True)
    x, grad = torch.randn(13, shape[0]).to(dtype), torch.randn(13, shape[1]).to(dtype)
    h, up = torch.randn(13, rank).to(dtype).requires_grad_(), torch.randn(shape[1], rank).requires_grad_()
    y = layer(x, LowRank(h, up))
    tolerance = 5e-3 if dtype == torch.bfloat16 else 2e-3
    expected = reference(x, layer) + h.detach().double() @ up.detach().double().t()
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
    y.backward(grad)
    for actual, product in (
        (h.grad, grad.double() @ up.detach().double()),
        (up.grad, grad.double().t() @ h.detach().double()),
    ):
        assert (actual.double() - product).norm() <= tolerance * product.norm()
