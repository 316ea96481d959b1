"""Packed attention: equal to the plain definition, value and gradient, and exactly isolated."""

from typing import Any

import pytest
import torch

from huarizo.data.packing import pack
from huarizo.data.tokens import Example
from huarizo.errors import ModelError
from huarizo.kernels import attention as kernel
from huarizo.model import attention
from tests.tiny import make_model

LENGTHS = [1, 2, 63, 64, 65, 511, 512]
# the norm of what may be wrong over the norm of what is right; fp32 adds up a few hundred rounded numbers, bf16 rounds
# probabilities, their gradient and the result
TOLERANCE = {torch.float32: 16 * torch.finfo(torch.float32).eps, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}


def in_c(dtype: torch.dtype, size: int) -> None:
    """Skips where the kernel in C can't be had."""
    if reason := kernel.reason_against(dtype, size):
        pytest.skip(reason)


@pytest.fixture(params=["c", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two ways to compute on a CPU is taken."""
    if request.param == "torch":
        monkeypatch.setattr(kernel, "reason_against", lambda *_: "not in this test")
    return request.param


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def value_and_gradients(
    states: list[torch.Tensor], weight: torch.Tensor, cu_seqlens: torch.Tensor
) -> list[torch.Tensor]:
    """Of (result * weight).sum(); states: q, k, v as [heads, T, D] of any strides, which stay as they are."""
    leaves = [t.detach().requires_grad_() for t in states]
    out, _ = attention.packed_attention(torch.nn.Module(), *(t[None] for t in leaves), None, cu_seqlens=cu_seqlens)
    return [out[0].detach(), *torch.autograd.grad((out[0] * weight).sum(), leaves)]


def plain_value_and_gradients(
    states: list[torch.Tensor], weight: torch.Tensor, cu_seqlens: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in states]
    out = attention.reference(*leaves, cu_seqlens, states[0].shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad((out * weight.double()).sum(), leaves)]


def random_states(heads: tuple[int, int], total: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(count, total, size).to(dtype) for count in (heads[0], heads[1], heads[1])]


def assert_near(ours: list[torch.Tensor], plain: list[torch.Tensor], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "grad_q", "grad_k", "grad_v"), ours, plain, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert float((a.double() - b).norm() / b.norm()) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [16, 32, 64, 80, 128])
@pytest.mark.parametrize(
    ("heads", "lengths"), [((6, 2), [7, 1, 97, 5]), ((4, 4), [33, 64]), ((8, 1), [191, 193, 2]), ((3, 3), [385])]
)
def test_value_and_gradient_equal_the_reference(
    way: str, dtype: torch.dtype, size: int, heads: tuple[int, int], lengths: list[int]
) -> None:
    if way == "c":
        in_c(dtype, size)
    torch.manual_seed(size)
    states, cu_seqlens = random_states(heads, sum(lengths), size, dtype), boundaries(lengths)
    weight = torch.randn(sum(lengths), heads[0], size).to(dtype)
    ours = value_and_gradients(states, weight, cu_seqlens)
    assert_near(ours, plain_value_and_gradients(states, weight, cu_seqlens), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strides_change_nothing(way: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths, size = [40, 61], 32
    cu_seqlens, weight = boundaries(lengths), torch.randn(6, 101, size).to(dtype).transpose(0, 1)
    fused = torch.randn(101, 6 + 3 + 3, size).to(dtype).transpose(0, 1)
    states = [*fused.split([6, 3, 3])]
    states[2] = torch.randn(3, 101, 2 * size).to(dtype)[..., ::2]
    ours = value_and_gradients(states, weight, cu_seqlens)
    straight = value_and_gradients([t.contiguous() for t in states], weight.contiguous(), cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip(ours, straight, strict=True))
    assert_near(ours, plain_value_and_gradients(states, weight, cu_seqlens), dtype)


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [16, 48, 64, 176, 240, 256])
def test_every_tier_equals_the_reference(size: int, dtype: torch.dtype) -> None:
    in_c(dtype, size)
    torch.manual_seed(size)
    lengths = [0, 1, 11, 12, 13, 31, 32, 33, 0, 100, 97, 2]
    states, weight = random_states((6, 2), sum(lengths), size, dtype), torch.randn(sum(lengths), 6, size).to(dtype)
    ours = value_and_gradients(states, weight, boundaries(lengths))
    assert_near(ours, plain_value_and_gradients(states, weight, boundaries(lengths)), dtype)


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_a_row_without_tokens(lengths: list[int], dtype: torch.dtype) -> None:
    in_c(dtype, 16)
    q, k, v = random_states((2, 1), 0, 16, dtype)
    cu_seqlens = boundaries(lengths)
    out, lse = kernel.forward(q, k, v, cu_seqlens, 1.0)
    grads = kernel.backward(torch.empty_like(out), q, k, v, out, lse, cu_seqlens, 1.0)
    assert out.shape == (0, 2, 16) and [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scores_of_any_size_stay_probabilities(dtype: torch.dtype) -> None:
    """Each token's own key scores higher than all others, by little or by so much that 2^x is 0."""
    in_c(dtype, 16)
    torch.manual_seed(0)
    for apart in (1.0, 10.0, 80.0, 87.0, 95.0, 1e4):
        keys = torch.zeros(1, 40, 16, dtype=dtype)
        keys[0, :, 0] = torch.arange(40) * apart
        q, v = torch.ones(1, 40, 16, dtype=dtype), torch.randn(1, 40, 16).to(dtype)
        out, lse = kernel.forward(q, keys, v, boundaries([40]), 1.0)
        plain = attention.reference(q.double(), keys.double(), v.double(), boundaries([40]), 1.0)
        assert float((out.double() - plain).norm() / plain.norm()) < TOLERANCE[dtype]
        grads = kernel.backward(torch.ones_like(out), q, keys, v, out, lse, boundaries([40]), 1.0)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad: float, dtype: torch.dtype) -> None:
    """A bad query spoils its own result alone, a bad key the result of every token that sees it and of none before."""
    in_c(dtype, 32)
    torch.manual_seed(0)
    q, k, v = random_states((2, 2), 50, 32, dtype)
    cu_seqlens = boundaries([20, 30])
    clean, _ = kernel.forward(q, k, v, cu_seqlens, 1.0)
    q_bad, k_bad = q.clone(), k.clone()
    q_bad[:, 25], k_bad[:, 25] = bad, bad
    out, _ = kernel.forward(q_bad, k, v, cu_seqlens, 1.0)
    assert out[25].isnan().all() and torch.equal(out[:25], clean[:25]) and torch.equal(out[26:], clean[26:])
    out, _ = kernel.forward(q, k_bad, v, cu_seqlens, 1.0)
    assert out[25:].isnan().all() and torch.equal(out[:25], clean[:25])


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_number_of_threads_gives_the_same_bytes(dtype: torch.dtype) -> None:
    in_c(dtype, 64)
    torch.manual_seed(0)
    lengths, before = [300, 5, 120, 64, 1], torch.get_num_threads()
    states, weight = random_states((6, 3), sum(lengths), 64, dtype), torch.randn(sum(lengths), 6, 64).to(dtype)
    results = []
    try:
        for threads in (1, 2, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(states, weight, boundaries(lengths)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_of_an_example_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    in_c(dtype, 64)
    torch.manual_seed(0)
    lengths = [97, 203, 31]
    states, weight = random_states((4, 2), sum(lengths), 64, dtype), torch.randn(sum(lengths), 4, 64).to(dtype)
    alone = value_and_gradients([t[:, 97:300] for t in states], weight[97:300], boundaries([203]))
    for t in (*states, weight.transpose(0, 1)):
        t[:, :97], t[:, 300:] = float("nan"), float("inf")
    packed = value_and_gradients(states, weight, boundaries(lengths))
    assert torch.equal(packed[0][97:300], alone[0])
    assert all(torch.equal(a[:, 97:300], b) for a, b in zip(packed[1:], alone[1:], strict=True))


@pytest.mark.parametrize("cu_seqlens", [[0, 5], [1, 8], [0, 9, 8], [0, 6, 4, 8]])
def test_boundaries_outside_the_row_are_refused(cu_seqlens: list[int]) -> None:
    in_c(torch.float32, 16)
    with pytest.raises(ValueError, match="cu_seqlens"):
        kernel.forward(*random_states((2, 1), 8, 16, torch.float32), torch.tensor(cu_seqlens), 1.0)


@pytest.mark.parametrize("heads", [(3, 2), (2, 4)])
def test_heads_that_do_not_divide_are_refused(heads: tuple[int, int]) -> None:
    in_c(torch.float32, 16)
    with pytest.raises(ValueError, match="fit each other"):
        kernel.forward(*random_states(heads, 8, 16, torch.float32), torch.tensor([0, 8]), 1.0)


def test_what_the_kernel_does_not_do_is_done_in_torch() -> None:
    assert "float64" in str(kernel.reason_against(torch.float64, 64))
    for size in (8, 40, 272):
        assert "multiple of 16" in str(kernel.reason_against(torch.float32, size))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 2], [64, 63, 65, 1]])
def test_equals_the_reference(way: str, heads: tuple[int, int], lengths: list[int]) -> None:
    torch.manual_seed(0)
    total, dim = sum(lengths), 16
    shapes = [(1, heads[0], total, dim), (1, heads[1], total, dim), (1, heads[1], total, dim)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    plain = [t.detach()[0].clone().requires_grad_() for t in ours]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    out, _ = attention.packed_attention(torch.nn.Module(), *ours, None, scaling=0.3, cu_seqlens=cu_seqlens)
    expected = attention.reference(*plain, cu_seqlens, scale=0.3)
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(expected)
    (out[0] * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad[0], b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_one_example_leaves_the_others_bit_identical(dtype: torch.dtype) -> None:
    model = make_model().to(dtype).eval()
    model.set_attn_implementation(attention.NAME)
    torch.manual_seed(1)
    examples = [Example(torch.randint(4, 260, (n,)).tolist(), [-100] * n) for n in LENGTHS]

    def logits(rows: list[Example]) -> list[torch.Tensor]:
        with torch.no_grad():
            out = model(**pack(rows).model_inputs())
        return list(out.logits[0].split(LENGTHS))

    before = logits(examples)
    for changed in range(len(examples)):
        other, example = list(examples), examples[changed]
        other[changed] = Example([(token - 4 + 100) % 256 + 4 for token in example.input_ids], example.labels)
        after = logits(other)
        for index, (a, b) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(a, b) == (index != changed), f"example {index} when {changed} changed"


@pytest.mark.parametrize("lengths", [[7, 64, 65], [300]])
def test_bf16_is_as_near_as_its_rounding(lengths: list[int]) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    exact = [torch.randn(heads, total, 32).bfloat16().double() for heads in (4, 2, 2)]
    weight = torch.randn(total, 4, 32).bfloat16()
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = (t.to(dtype)[None].requires_grad_() for t in exact)
        out, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, cu_seqlens=cu_seqlens)
        (out[0] * weight.to(dtype)).sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for true, rounded in zip(*results, strict=True):
        # probabilities, their gradient and the result are each rounded to 8 bits of mantissa
        assert float((rounded.double() - true).norm() / true.norm()) < 4 * 2**-8


@pytest.mark.parametrize("size", [8, 16])
def test_the_operator_is_known_to_compile(size: int) -> None:
    args = (torch.randn(4, 70, size), torch.randn(2, 70, size), torch.randn(2, 70, size))
    args = tuple(t.requires_grad_() for t in args)
    torch.library.opcheck(torch.ops.huarizo.packed_attention.default, (*args, torch.tensor([0, 3, 70]), 0.3))


def test_generation_without_boundaries_is_refused() -> None:
    model = make_model()
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(torch.tensor([[5, 6]]))


def test_what_transformers_passes_of_a_llama_is_taken() -> None:
    x, cu_seqlens = torch.randn(1, 2, 5, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
    plain, _ = attention.packed_attention(torch.nn.Module(), x, x, x, None, cu_seqlens=cu_seqlens)
    out, _ = attention.packed_attention(
        torch.nn.Module(), x, x, x, None, cu_seqlens=cu_seqlens, scaling=16**-0.5, dropout=0.0, use_cache=False,
        position_ids=torch.arange(5)[None], num_items_in_batch=torch.tensor(3), output_attentions=False,
        sliding_window=None, softcap=None, s_aux=None, is_causal=True,
    )  # fmt: skip
    assert torch.equal(out, plain)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"sliding_window": 4096}, "sliding_window=4096"), ({"softcap": 50.0}, "softcap=50.0"),
        ({"s_aux": torch.zeros(2)}, "s_aux"), ({"dropout": 0.1}, "dropout=0.1"),
        ({"position_bias": torch.zeros(1)}, "position_bias"), ({"is_causal": False}, "is_causal=False"),
        ({"output_attentions": True}, "output_attentions=True"), ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"never_heard_of": 1}, "never_heard_of=1"),
    ],
    ids=str,
)  # fmt: skip
def test_another_attention_is_refused_by_name(asked: dict[str, Any], named: str) -> None:
    x, cu_seqlens = torch.randn(1, 2, 5, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ModelError, match=f"packed attention has no {named}$"):
        attention.packed_attention(torch.nn.Module(), x, x, x, None, cu_seqlens=cu_seqlens, **asked)


def test_masks_and_attention_both_ways_are_refused() -> None:
    x, cu_seqlens = torch.randn(1, 2, 5, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ModelError, match="attention_mask"):
        attention.packed_attention(torch.nn.Module(), x, x, x, torch.zeros(1, 1, 5, 5), cu_seqlens=cu_seqlens)
    encoder = torch.nn.Module()
    encoder.is_causal = False
    with pytest.raises(ModelError, match="is_causal=False"):
        attention.packed_attention(encoder, x, x, x, None, cu_seqlens=cu_seqlens)
    out, _ = attention.packed_attention(encoder, x, x, x, None, cu_seqlens=cu_seqlens, is_causal=True)
    assert out.shape == (1, 5, 2, 16)


def test_a_model_with_a_sliding_window_is_refused_and_one_without_taken() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    ids, cu_seqlens = torch.tensor([[1, 2, 3]]), torch.tensor([0, 3], dtype=torch.int32)
    for window in (2, None):
        config = MistralConfig(**sizes, sliding_window=window, attn_implementation=attention.NAME)
        model = MistralForCausalLM(config).eval()
        if window is None:
            packed = model(input_ids=ids, cu_seqlens=cu_seqlens).logits
            model.set_attn_implementation("sdpa")
            torch.testing.assert_close(packed, model(input_ids=ids).logits)
        else:
            with pytest.raises(ModelError, match="sliding_window=2"):
                model(input_ids=ids, cu_seqlens=cu_seqlens)
