"""The Triton kernels of an int8 layer in Triton's interpreter, on a CPU: the same integers as the CPU's own, over odd shapes.

Run by test_int8_gpu.py in a process of its own, because Triton decides when it is imported whether it interprets.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from triton.runtime import interpreter

from huarizo.kernels import int8 as in_c
from huarizo.kernels import int8_gpu, int8_triton
from huarizo.kernels.int8_gpu import LARGE, SMALL, Tile
from huarizo.model.frozen import int8
from huarizo.model.frozen.int8 import Int8Linear, quantise, reference, reference_gradient, rotated
from huarizo.model.frozen.linear import LowRank

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # the interpreter truncates to bf16
SMALLEST = Tile(16, 32, 32, 4, 1)
ODD = [
    (1, 1, torch.float32), (2, 31, torch.bfloat16), (3, 32, torch.float16), (17, 33, torch.float32),
    (40, 100, torch.bfloat16), (5, 1000, torch.float16), (1, 8200, torch.float32),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def interpreting() -> None:
    """Triton's own functions are replaced once for each module, not in each call, which takes most of the time.

    Triton 3.6 makes an integer of an array of one element in a way that NumPy 2.4 refuses.
    """
    assert int8_gpu.reason_against(CPU, torch.bfloat16) is None
    patch, patch_tensor, patched = interpreter._patch_lang, interpreter._patch_lang_tensor, set[str]()

    def once(function: Callable[..., None]) -> SimpleNamespace:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    def with_integers(tensor: Any, scope: object) -> None:
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang, interpreter._patch_lang_tensor = once, with_integers


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers keep a plain weight, which the kernels in Triton multiply."""
    monkeypatch.setattr(int8.kernel, "reason_against", lambda dtype: "not in this test")
    torch.manual_seed(1)


def exact(tokens: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers whose sums and differences float32 holds exactly, in whatever order they are added."""
    return torch.randint(-100, 100, (tokens, channels)).to(dtype)


def powers_of_2(size: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-3, 4, (size,))


def padded(size: int) -> int:
    return -(-size // 32) * 32


def layer_of(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = False) -> Int8Linear:
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    return quantise([linear], torch.rand(inputs) + 0.5)[0]


@pytest.mark.parametrize(("tokens", "channels", "dtype"), ODD)
def test_rows_are_the_integers_of_torch(tokens: int, channels: int, dtype: torch.dtype) -> None:
    x, scale = exact(tokens, channels, dtype), powers_of_2(channels)
    rows, row_scale = int8_gpu.quantise(x, scale)
    expected, expected_scale = int8.quantise_rows(rotated(x.float() * scale))
    assert torch.equal(rows, expected) and torch.equal(row_scale, expected_scale[:, 0])


@pytest.mark.parametrize(("tokens", "channels", "dtype"), ODD)
def test_gradients_are_the_integers_of_torch(tokens: int, channels: int, dtype: torch.dtype) -> None:
    grad, scale = exact(tokens, channels, dtype), powers_of_2(padded(channels)) * 1e-5
    rows, row_scale = int8_gpu.quantise_gradient(grad, scale)
    expected, expected_scale = int8.quantise_gradient(rotated(grad.float()) * scale)
    assert torch.equal(rows, expected) and torch.equal(row_scale, expected_scale[:, 0])


def test_a_long_gradient_is_the_integers_of_torch() -> None:
    """In parts, with columns whose number's fourth power is beyond 2^32."""
    grad, scale = exact(1, 13_000, torch.bfloat16), powers_of_2(padded(13_000))
    expected, expected_scale = int8.quantise_gradient(rotated(grad.float()) * scale)
    rows, row_scale = int8_gpu.quantise_gradient(grad, scale)
    assert torch.equal(rows, expected) and torch.equal(row_scale, expected_scale[:, 0])


@pytest.mark.parametrize("channels", [33, 576])
def test_any_rows_are_the_integers_of_the_kernel_in_c(channels: int) -> None:
    """Both add in the same order."""
    if isinstance(reason := in_c.library(), str):
        pytest.skip(reason)
    x, scale = torch.randn(7, channels).bfloat16(), torch.rand(channels) + 0.1
    rows, row_scale = int8_gpu.quantise(x, scale)
    in_c_rows, in_c_scale, _ = in_c.quantise(x, scale)
    assert torch.equal(rows, in_c_rows[:, : rows.shape[1]]) and torch.equal(row_scale, in_c_scale)


@pytest.mark.parametrize(("channels", "dtype"), [(65, torch.float16), (650, torch.bfloat16)])
def test_any_rows_are_rounded_to_the_nearest_or_the_next_integer(channels: int, dtype: torch.dtype) -> None:
    x, scale = torch.randn(7, channels).to(dtype), torch.rand(padded(channels)) + 0.1
    rows, row_scale = int8_gpu.quantise(x, scale[:channels])
    steps = rotated(x.double() * scale[:channels]) / row_scale[:, None].double()
    assert float((rows - steps).abs().max()) <= 0.5 + 1e-4
    rows, row_scale = int8_gpu.quantise_gradient(x, scale)
    steps = rotated(x.double()) * scale / row_scale[:, None].double()
    assert float((rows - steps).abs().max()) <= 1 + 1e-4 and float((rows - steps).mean().abs()) < 0.1


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "rank", "tile", "dtype"),
    [
        (1, 1, 1, 0, SMALLEST, torch.float32),
        (3, 33, 65, 1, LARGE[0], torch.float32),
        (17, 65, 33, 8, SMALLEST, torch.bfloat16),
        (40, 200, 96, 40, SMALL[1], torch.float16),
        (35, 96, 70, 3, Tile(32, 64, 64, 4, 1), torch.bfloat16),
    ],
)
def test_both_products_equal_the_reference(
    tokens: int, inputs: int, outputs: int, rank: int, tile: Tile, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_gpu, "tile_for", lambda *_: tile)
    layer = layer_of(inputs, outputs, dtype, bias=tokens != 17)
    x, grad = torch.randn(tokens, inputs).to(dtype).requires_grad_(), torch.randn(tokens, outputs).to(dtype)
    h, up = torch.randn(tokens, rank).to(dtype), torch.randn(outputs, rank)
    y = layer(x, LowRank(h, up) if rank else None)
    y.backward(grad)
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    expected = reference(x.detach(), layer) + h.double() @ up.double().t()
    for actual, wanted in ((y.detach(), expected), (x.grad, reference_gradient(grad, layer))):
        assert actual.shape == wanted.shape
        assert (actual.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def test_products_are_those_of_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(130, 70, torch.float32, bias=True)
    x, grad = exact(21, 130, torch.float32), torch.randn(21, 70)
    layer.input_scale = powers_of_2(130)
    ours = layer(x), layer.input_gradient(grad)
    monkeypatch.setattr(int8_gpu, "reason_against", lambda *_: "not in this test")
    for actual, expected in zip(ours, (layer(x), layer.input_gradient(grad)), strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_sums_are_exact() -> None:
    """Extreme integers and a rotation undone: no sum of a depth overflows or is rounded before it is converted."""
    rows, weight = torch.randint(-127, 128, (9, 2048), dtype=torch.int8), torch.randint(-127, 128, (32, 2048))
    rows[0], weight[0], weight[1] = 127, -127, 127
    weight, x = weight.to(torch.int8), torch.zeros(9, 2048)
    none = torch.empty(0, dtype=torch.int64), torch.empty(32, 0), None, 32
    y = int8_gpu.forward(rows, torch.ones(9), weight, torch.ones(32), x, *none)
    expected = rows.double() @ weight.double().t()
    assert torch.allclose(rotated(y.double()) / 32, expected, rtol=0, atol=8)


@pytest.mark.parametrize(("channel", "value"), [(0, float("nan")), (31, float("inf")), (99, -float("inf"))])
def test_a_row_with_a_nan_is_nan_and_no_other(channel: int, value: float) -> None:
    layer = layer_of(100, 70, torch.float32)
    x, grad = torch.randn(20, 100), torch.randn(20, 70)
    clean = layer(x), layer.input_gradient(grad)
    x[2, channel] = value
    grad[2, channel % 70] = value
    others = torch.arange(20) != 2
    for before, after in zip(clean, (layer(x), layer.input_gradient(grad)), strict=True):
        assert torch.equal(before[others], after[others])
        assert after[2].isnan().all()


def test_rows_of_zeros_rows_apart_and_no_rows() -> None:
    layer = layer_of(100, 70, torch.bfloat16)
    for products in (layer, layer.input_gradient):
        size = 100 if products is layer else 70
        assert not products(torch.zeros(6, size, dtype=torch.bfloat16)).any()
        assert products(torch.zeros(0, size, dtype=torch.bfloat16)).shape == (0, 170 - size)
        apart = torch.randn(5, 200).bfloat16()[:, 31 : 31 + size]
        turned = torch.randn(size, 5).bfloat16().t()
        for x in (apart, turned):
            assert torch.equal(products(x), products(x.contiguous()))


@pytest.mark.parametrize("shape", [(32, 32), (96, 160)])
def test_a_weight_is_transposed(shape: tuple[int, int]) -> None:
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    assert torch.equal(int8_gpu.transposed(weight), weight.t())


def test_the_compiler_sees_the_right_shapes() -> None:
    layer, checks = layer_of(65, 33, torch.float32), ("test_schema", "test_faketensor")
    x, grad = torch.randn(4, 65), torch.randn(4, 33)
    floats = layer.float_channels, layer.float_weight, None, 33
    of_x = *int8_gpu.quantise(x, layer.input_scale), layer.weight, layer.scale, x, *floats
    of_gradient = grad, layer.weight, layer.scale, layer.inverse_smoothing
    operations = torch.ops.huarizo
    torch.library.opcheck(operations.int8_gpu_quantise.default, (x, layer.input_scale), test_utils=checks)
    torch.library.opcheck(operations.int8_gpu_forward.default, of_x, test_utils=checks)
    torch.library.opcheck(operations.int8_gpu_backward.default, of_gradient, test_utils=checks)


def test_launches_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(int8_triton, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            launches.append(self.name)
            return self.kernel[grid]

    layer = layer_of(65, 33, torch.float32)
    x, grad = torch.randn(4, 65), torch.randn(4, 33)
    for name in ("quantise", "product", "transpose"):
        monkeypatch.setattr(int8_triton, name, Counted(name))
    layer(x)
    assert launches == ["quantise", "product"]
    layer.input_gradient(grad)
    assert sorted(launches[2:]) == ["product", "quantise", "transpose"]
