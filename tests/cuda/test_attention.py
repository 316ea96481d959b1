"""torch's kernels for examples of different lengths equal the plain definition, value and gradient."""

from typing import Any

import pytest
import torch

from huarizo.kernels import variable_length
from huarizo.model import attention
from tests.model.test_attention import SINKS, boundaries, name_of, plain_value_and_gradients, random_states

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
RULES = [{}, {"sliding_window": 7}, {"sliding_window": 64}, {"softcap": 30.0}, {"sliding_window": 7, "s_aux": SINKS}]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [40, 64, 128, 256, 36])
@pytest.mark.parametrize("rule", RULES, ids=name_of)
@pytest.mark.parametrize("kernel", ["fastest", "efficient"])
def test_value_and_gradient_equal_the_reference(
    kernel: str, rule: dict[str, Any], size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows longer than a block, and examples longer than a window; `efficient` is what a T4 has."""
    if kernel == "efficient":
        monkeypatch.setattr(variable_length, "FLASH_SINCE", (99, 0))
    torch.manual_seed(0)
    lengths = [5, 300, 1, 77, 200]
    states, weight = random_states((6, 2), sum(lengths), size, dtype), torch.randn(sum(lengths), 6, size).to(dtype)
    leaves = [t.cuda().requires_grad_() for t in states]
    on_card = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in rule.items()}
    out, _ = attention.packed_attention(
        torch.nn.Module(), *(t[None] for t in leaves), None, cu_seqlens=boundaries(lengths).cuda(),
        longest=max(lengths), **on_card,
    )  # fmt: skip
    ours = [out[0].detach(), *torch.autograd.grad((out[0] * weight.cuda()).sum(), leaves)]
    plain = plain_value_and_gradients(states, weight, boundaries(lengths), **rule)
    for a, b in zip(ours, plain, strict=True):
        assert float((a.cpu().double() - b).norm() / b.norm()) < TOLERANCE[dtype]


def test_nothing_waits_for_the_gpu() -> None:
    lengths = [5, 300, 1]
    q, k, v = (t.cuda().half().requires_grad_() for t in random_states((6, 2), 306, 64, torch.float32))
    ends = boundaries(lengths).cuda()
    for cap in (0.0, 30.0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, _ = attention.packed_attention(
                torch.nn.Module(), q[None], k[None], v[None], None, cu_seqlens=ends, longest=300, softcap=cap
            )
            out.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
