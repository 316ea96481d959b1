"""The chunked loss equals the plain one, in value and gradient, and computes nothing without labels."""

from typing import Any

import pytest
import torch
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, PretrainedConfig

from huarizo.model import loss
from huarizo.model.compile import why_not
from huarizo.model.loss import PLAIN, LogitRule

RULES = {
    "plain": PLAIN,
    "scaled": LogitRule(scale=torch.tensor(0.3)),
    "capped": LogitRule(cap=torch.tensor(2.5)),
    "both": LogitRule(torch.tensor(1.7), torch.tensor(4.0)),
}


@pytest.mark.parametrize("count", [1, 63, 64, 65, 199])
@pytest.mark.parametrize("trainable_head", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_reference(count: int, trainable_head: bool, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 301)  # chunks of 64 rows
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 301, bias=False).requires_grad_(trainable_head)
    hidden, targets = torch.randn(count, 32), torch.randint(0, 301, (count,))
    results = []
    for function in (loss.summed_loss, loss.reference):
        x = hidden.clone().requires_grad_()
        head.zero_grad()
        value = function(x, head, targets, rule=RULES[rule])
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


@pytest.mark.parametrize("rule", RULES)
def test_without_gradients_a_rule_holds_too(rule: str) -> None:
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(16, 50), 3 * torch.randn(60, 16), torch.randint(0, 50, (60,))
    expected = loss.reference(hidden, head, targets, RULES[rule]).detach()
    assert (rule == "plain") == torch.equal(expected, loss.reference(hidden, head, targets).detach())
    with torch.no_grad():
        torch.testing.assert_close(loss.summed_loss(hidden, head, targets, rule=RULES[rule]), expected)


@pytest.mark.skipif(why_not(torch.device("cpu")) is not None, reason="nothing compiles here")
def test_compiled_it_has_the_same_gradient() -> None:
    compiled: Any = torch.compile(loss.loss_and_gradient, dynamic=True)
    torch.manual_seed(0)
    for rows, (name, rule) in enumerate(RULES.items(), start=5):
        logits, targets = 3 * torch.randn(rows, 301), torch.randint(0, 301, (rows,))
        for ours, plain in zip(
            compiled(logits, targets, rule), loss.loss_and_gradient(logits, targets, rule), strict=True
        ):
            torch.testing.assert_close(ours, plain, msg=name)


@pytest.mark.parametrize(
    ("config", "scale", "cap"),
    [
        (LlamaConfig(), None, None),
        (GraniteConfig(logits_scaling=8.0), 0.125, None),
        (CohereConfig(logit_scale=0.0625), 0.0625, None),
        (Gemma2Config(final_logit_softcapping=30.0), None, 30.0),
        (Gemma2Config(final_logit_softcapping=None), None, None),
    ],
    ids=["llama", "granite", "cohere", "gemma2", "gemma2 uncapped"],
)
def test_the_rule_of_a_model_is_in_its_configuration(
    config: PretrainedConfig, scale: float | None, cap: float | None
) -> None:
    found = loss.rule_of(config)
    assert [None if number is None else number.item() for number in found] == [scale, cap]
