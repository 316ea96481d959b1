"""The int8 layer's Triton kernels on a card: the integers of the CPU, and its products to the rounding of the dtype."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from huarizo.kernels import int8_gpu
from huarizo.model.frozen import int8
from huarizo.model.frozen.int8 import Int8Linear, quantise, reference, reference_gradient, rotated
from huarizo.model.frozen.linear import LowRank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CARD = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (17, 33, 65), (40, 576, 192), (130, 2048, 256), (700, 2048, 5632), (300, 5632, 2048)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if reason := int8_gpu.reason_against(CARD, request.param):
        pytest.skip(reason)
    return request.param


def layer_of(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = False) -> Int8Linear:
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device=CARD).requires_grad_(False)
    return quantise([linear], torch.rand(inputs, device=CARD) + 0.5)[0]


@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (40, 100), (33, 2048), (9, 5632), (3, 32_000), (2, 128_256)])
def test_the_integers_are_the_cpus(tokens: int, channels: int, dtype: torch.dtype) -> None:
    """Of numbers whose sums float32 holds exactly."""
    x, padded = torch.randint(-100, 100, (tokens, channels)).to(dtype), -(-channels // 32) * 32
    scale = 2.0 ** torch.randint(-3, 4, (padded,))
    on_card = x.to(CARD), scale.to(CARD)
    found = int8_gpu.quantise(on_card[0], on_card[1][:channels]), int8_gpu.quantise_gradient(*on_card)
    of_cpu = (
        int8.quantise_rows(rotated(x.float() * scale[:channels])),
        int8.quantise_gradient(rotated(x.float()) * scale),
    )
    for (rows, row_scale), (expected, expected_scale) in zip(found, of_cpu, strict=True):
        assert torch.equal(rows.cpu(), expected) and torch.equal(row_scale.cpu(), expected_scale[:, 0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 8, 40])
def test_both_products_equal_the_reference(shape: tuple[int, int, int], rank: int, dtype: torch.dtype) -> None:
    tokens, inputs, outputs = shape
    layer = layer_of(inputs, outputs, dtype, bias=rank == 8)
    x = torch.randn(tokens, inputs, device=CARD).to(dtype).requires_grad_()
    grad = torch.randn(tokens, outputs, device=CARD).to(dtype)
    h, up = torch.randn(tokens, rank, device=CARD).to(dtype), torch.randn(outputs, rank, device=CARD)
    y = layer(x, LowRank(h, up) if rank else None)
    y.backward(grad)
    assert x.grad is not None
    expected = reference(x.detach(), layer) + h.double() @ up.double().t()
    tolerance = 5e-3 if dtype == torch.bfloat16 else 2e-3
    for actual, wanted in ((y.detach(), expected), (x.grad, reference_gradient(grad, layer))):
        assert actual.dtype == dtype
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("tile", sorted({tile for tiles in int8_gpu.TILES.values() for tile in tiles}))
def test_every_tile_gives_the_same(tile: int8_gpu.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, grad = layer_of(2048, 5632, torch.float16), torch.randn(150, 2048), torch.randn(150, 5632)
    x, grad = x.half().to(CARD), grad.half().to(CARD)
    expected = layer(x), layer.input_gradient(grad)
    monkeypatch.setattr(int8_gpu, "tile_for", lambda *_: tile)
    for actual, wanted in zip((layer(x), layer.input_gradient(grad)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-3, atol=1e-5)


def test_nothing_waits_and_the_same_rows_give_the_same_bytes(dtype: torch.dtype) -> None:
    layer = layer_of(576, 200, dtype)
    products: tuple[tuple[Callable[[torch.Tensor], torch.Tensor], int], ...] = (
        (layer, 576), (layer.input_gradient, 200),
    )  # fmt: skip
    for product, width in products:
        x = torch.randn(333, width, device=CARD).to(dtype)
        first = product(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = product(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(first, again)


def test_a_row_with_a_nan_is_nan_and_no_other(dtype: torch.dtype) -> None:
    layer = layer_of(100, 70, dtype)
    for product, width in ((layer, 100), (layer.input_gradient, 70)):
        x = torch.randn(40, width, device=CARD).to(dtype)
        clean = product(x)
        x[2, 31], x[3, 0] = float("nan"), float("inf")
        found, others = product(x), torch.arange(40, device=CARD) > 3
        assert torch.equal(found[others], clean[others]) and found[2:4].isnan().all()
