"""The chunked loss equals the plain one, in value and gradient, and computes nothing without labels."""

import pytest
import torch

from huarizo.model import loss


@pytest.mark.parametrize("count", [1, 63, 64, 65, 199])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_equals_the_reference(count: int, trainable_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 301)  # chunks of 64 rows
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 301, bias=False).requires_grad_(trainable_head)
    hidden, targets = torch.randn(count, 32), torch.randint(0, 301, (count,))
    results = []
    for function in (loss.summed_loss, loss.reference):
        x = hidden.clone().requires_grad_()
        head.zero_grad()
        value = function(x, head, targets)
        (value / count).backward()
        results.append((value.detach(), x.grad, head.weight.grad.clone() if trainable_head else torch.zeros(1)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_no_label_gives_zero_with_gradients_of_zero() -> None:
    hidden, head = torch.randn(0, 8, requires_grad=True), torch.nn.Linear(8, 5)
    value = loss.summed_loss(hidden, head, torch.empty(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0 and hidden.grad is not None
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())  # as DDP wants them
    with torch.no_grad():
        assert loss.summed_loss(hidden, head, torch.empty(0, dtype=torch.long)).item() == 0


@pytest.mark.parametrize("count", [1, 3, 7, 11, 57, 391])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_share_of_a_label_is_not_rounded(count: int, dtype: torch.dtype) -> None:
    """A factor of 1/3 in bf16 is 0.2 % too large, and with it each gradient; roundings of each number cancel out."""
    torch.manual_seed(count)
    head = torch.nn.Linear(512, 300, bias=False).to(dtype).requires_grad_(False)
    hidden, targets = torch.randn(count, 512).to(dtype), torch.randint(300, (count,))
    gradients = []
    for labels in (count, 1):
        x = hidden.clone().requires_grad_()
        (loss.summed_loss(x, head, targets) / labels).backward()
        assert x.grad is not None and x.grad.dtype == dtype
        gradients.append(x.grad.double())
    ours, exact = gradients[0], gradients[1] / count
    assert float((ours * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=3e-4)


def test_without_gradients_the_value_is_the_same() -> None:
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(16, 50), torch.randn(600, 16), torch.randint(0, 50, (600,))
    with torch.no_grad():
        value = loss.summed_loss(hidden, head, targets)
    torch.testing.assert_close(value, loss.reference(hidden, head, targets).detach(), rtol=1e-5, atol=1e-4)
