"""Which of torch's kernels a GPU gets, and the shapes of their results, on tensors without data; tests/cuda runs them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import huarizo.model.attention  # noqa: F401  # registers the operation
from huarizo.kernels import variable_length
from huarizo.kernels.variable_length import Kernel, kernel_for

T4, A100 = (7, 5), (8, 0)


@pytest.fixture(params=[T4, A100], ids=["T4", "A100"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    return request.param


def states(dtype: torch.dtype, size: int = 64, tokens: int = 100, device: str = "cuda") -> list[torch.Tensor]:
    """q, k and v of 8 and 2 heads."""
    return [torch.empty(heads, tokens, size, dtype=dtype, device=device) for heads in (8, 2, 2)]


def test_the_kernel_follows_from_card_dtype_and_rule(capability: tuple[int, int]) -> None:
    with FakeTensorMode():
        found = {
            dtype: kernel_for(states(dtype)[0], 0.0, None)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        }
        assert found == {
            torch.float16: "efficient" if capability == T4 else "flash",
            torch.bfloat16: None if capability == T4 else "flash",
            torch.float32: "efficient",
            torch.float64: None,
        }
        q = states(torch.float16)[0]
        assert kernel_for(q, 30.0, None) is None and kernel_for(q, 0.0, torch.zeros(8)) is None
        assert [kernel_for(states(torch.float16, size)[0], 0.0, None) for size in (36, 264)] == [None, None]
        assert kernel_for(states(torch.float16, device="cpu")[0], 0.0, None) is None


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("window", [0, 7])
def test_results_have_the_shapes_that_the_compiler_is_told(kernel: Kernel, window: int) -> None:
    q, k, v = states(torch.float16, device="meta")
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    out, saved = variable_length.forward(kernel, q, k, v, ends, 70, 0.1, window)
    assert out.shape == (100, 8, 64) and saved.dtype == torch.float32
    assert tuple(saved.shape) == variable_length.saved_shape(kernel, q, ends, 70)
    if kernel == "efficient":
        return  # torch 2.13 knows no shapes of its gradients
    grads = variable_length.backward(kernel, out, q, k, v, out, saved, ends, 70, 0.1, window)
    for grad, x in zip(grads, (q, k, v), strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype
        assert grad.stride() == (64, 64 * x.shape[0], 1)


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_the_operation_gives_the_compiler_what_it_computes(capability: tuple[int, int], cap: float) -> None:
    with FakeTensorMode():
        q, k, v = states(torch.float16)
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        out, saved = torch.ops.huarizo.packed_attention(q, k, v, ends, 70, 0.1, 0, cap, None)
        assert out.shape == (100, 8, 64) and out.is_contiguous()
        if kernel := kernel_for(q, cap, None):
            assert tuple(saved.shape) == variable_length.saved_shape(kernel, q, ends, 70)
        grads = torch.ops.huarizo.packed_attention_backward(out, q, k, v, out, saved, ends, 70, 0.1, 0, cap, None)
        by_head = not kernel_for(q, cap, None)
        assert all(
            grad.shape == x.shape and grad.is_contiguous() == by_head for grad, x in zip(grads, (q, k, v), strict=True)
        )
