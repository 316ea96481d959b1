"""The hashed dropout drops the share it should, scales the rest, and is a pure function of its seed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from huarizo.model import dropout
from huarizo.model.dropout import HashedDropout, hash_dropouts, hashed


def test_the_hash_is_uniform_and_its_streams_unrelated() -> None:
    first, second = (hashed(2**20, torch.tensor([seed])).double() / 2**32 for seed in (1, 2))
    for stream in (first, second):
        assert float(stream.mean()) == pytest.approx(0.5, abs=2e-3)
        assert float(stream.var()) == pytest.approx(1 / 12, rel=5e-3)
        counts = torch.histc(stream, 64, 0, 1)
        assert float(((counts - 2**14) ** 2 / 2**14).sum()) < 120  # chi-square of 63 degrees of freedom: 1e-5
    for a, b in ((first[:-1], first[1:]), (first, second), (first[:-2048], first[2048:]), (first[1:], second[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_equals_the_reference_in_value_and_gradient(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 67, 33).to(dtype).requires_grad_()
    seed = torch.tensor([987654321])
    y = HashedDropout(p, seed)(x)
    y.sum().backward()
    assert torch.equal(y, dropout.reference(x.detach(), seed, p))
    assert x.grad is not None and torch.equal(x.grad, dropout.reference(torch.ones_like(x), seed, p))
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "rank"), [(1, 16, 1), (3, 33, 3), (70, 100, 8), (5, 576, 65), (66, 2048, 16)]
)
def test_a_linear_layer_behind_it(rows: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rank)
    x, weight, grad = torch.randn(rows, inputs).to(dtype), torch.randn(rank, inputs), torch.randn(rows, rank).to(dtype)
    module = HashedDropout(0.2, torch.tensor([4321]))
    exact = [t.double().requires_grad_() for t in (x, weight.to(dtype))]
    keep = dropout.reference(torch.ones_like(x), module.seed, 0.2) > 0
    wanted = F.linear(torch.where(keep, exact[0] / 0.8, 0), exact[1])
    wanted.backward(grad.double())
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    y = module.linear(ours[0], ours[1])
    y.backward(grad)
    assert y.dtype == dtype and ours[0].grad is not None and ours[1].grad is not None
    assert ours[0].grad.dtype == dtype and ours[1].grad.dtype == torch.float32
    for actual, expected in ((y, wanted), (ours[0].grad, exact[0].grad), (ours[1].grad, exact[1].grad)):
        assert expected is not None
        tolerance = 1e-6 if actual.dtype == torch.float32 and rank <= dropout.THIN else 3e-3
        assert float((actual.double() - expected).norm()) <= tolerance * float(expected.norm())
    assert not ours[0].grad[~keep].any()
    assert torch.equal(module.eval().linear(x, weight), F.linear(x, weight.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_layer_is_the_same_on_any_number_of_threads(dtype: torch.dtype) -> None:
    x, weight, grad = torch.randn(2, 45, 300).to(dtype)[:, :, 7:250], torch.randn(9, 243), torch.randn(90, 9).to(dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = HashedDropout(0.1, torch.tensor([5])).linear(*leaves)
        y.backward(grad.view_as(y))
        results.append((y, leaves[0].grad, leaves[1].grad))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    module, x = HashedDropout(0.1, torch.tensor([5])), torch.randn(4, 20)
    for weight in (torch.randn(3, 21), torch.randn(3, 20).bfloat16()):
        with pytest.raises(ValueError, match="doesn't fit"):
            module.linear(x, weight)


def test_the_compiler_sees_the_right_shapes() -> None:
    args = torch.randn(6, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True), torch.tensor([7]), 0.5
    torch.library.opcheck(torch.ops.huarizo.dropped_linear.default, args)


def test_evaluation_passes_everything() -> None:
    x = torch.randn(4, 5)
    assert HashedDropout(0.5, torch.tensor([1])).eval()(x) is x


def test_each_forward_draws_new_masks_from_torchs_seed() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.3)), nn.Dropout(0.0))
    hash_dropouts(model, model)
    assert sum(isinstance(module, HashedDropout) for module in model.modules()) == 2
    x = torch.randn(50, 64)
    torch.manual_seed(5)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(model(x), first) and torch.equal(model(x), second)
    assert not any("seed" in name for name in model.state_dict())
