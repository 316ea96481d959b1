"""The hashed dropout drops the share it should, scales the rest, and is a pure function of its seed."""

import pytest
import torch
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
