"""Packed attention: equal to the plain definition, value and gradient, and exactly isolated."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
    states: list[torch.Tensor], weight: torch.Tensor, cu_seqlens: torch.Tensor, **asked: Any
) -> list[torch.Tensor]:
    """Of (result * weight).sum(); states: q, k, v as [heads, T, D] of any strides, which stay as they are."""
    leaves = [t.detach().requires_grad_() for t in states]
    row = (t[None] for t in leaves)
    longest = int(cu_seqlens.diff().max())
    out, _ = attention.packed_attention(torch.nn.Module(), *row, None, cu_seqlens=cu_seqlens, longest=longest, **asked)
    return [out[0].detach(), *torch.autograd.grad((out[0] * weight).sum(), leaves)]


def plain_value_and_gradients(
    states: list[torch.Tensor], weight: torch.Tensor, cu_seqlens: torch.Tensor, **asked: Any
) -> list[torch.Tensor]:
    """In float64. asked: keyword arguments of `packed_attention`."""
    leaves = [t.detach().double().requires_grad_() for t in states]
    scale = asked.get("scaling", states[0].shape[-1] ** -0.5)
    rule = asked.get("sliding_window", 0), asked.get("softcap", 0.0), asked.get("s_aux")
    out = attention.reference(*leaves, cu_seqlens, scale, *rule)
    return [out.detach(), *torch.autograd.grad((out * weight.double()).sum(), leaves)]


def random_states(heads: tuple[int, int], total: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(count, total, size).to(dtype) for count in (heads[0], heads[1], heads[1])]


def assert_near(ours: list[torch.Tensor], plain: list[torch.Tensor], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "grad_q", "grad_k", "grad_v"), ours, plain, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        right, typical = float(b.norm()), float(plain[3].norm())
        # q and k have no gradient where each query sees one key
        right = right if right > 1e-9 * typical else typical
        assert float((a.double() - b).norm()) < TOLERANCE[dtype] * right, name


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


SINKS = torch.linspace(-3, 3, 6)
RULES = [
    *({"sliding_window": window} for window in (1, 2, 7, 63, 64, 65, 130, 1000)),
    *({"softcap": cap} for cap in (1.0, 30.0, 50)),
    {"s_aux": SINKS},
    {"sliding_window": 65, "softcap": 2.0},
    {"sliding_window": 7, "s_aux": SINKS},
    {"softcap": 30.0, "s_aux": SINKS},
    {"sliding_window": 64, "softcap": 1.0, "s_aux": SINKS},
]


def name_of(rule: dict[str, Any]) -> str:
    return ", ".join(key if isinstance(value, torch.Tensor) else f"{key}={value}" for key, value in rule.items())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_windows_caps_and_sinks_equal_the_reference(way: str, dtype: torch.dtype, rule: dict[str, Any]) -> None:
    if way == "c":
        in_c(dtype, 32)
    torch.manual_seed(0)
    lengths, heads = [7, 1, 230, 64, 66], (6, 2)
    # large scores, so that caps bite; torch rounds scores in bf16, which only small ones bear
    scaling = 32**-0.5 if way == "torch" and dtype == torch.bfloat16 else 0.5
    states, weight = random_states(heads, sum(lengths), 32, dtype), torch.randn(sum(lengths), 6, 32).to(dtype)
    ours = value_and_gradients(states, weight, boundaries(lengths), scaling=scaling, **rule)
    assert_near(ours, plain_value_and_gradients(states, weight, boundaries(lengths), scaling=scaling, **rule), dtype)


def test_the_rules_of_these_tests_bite() -> None:
    """The reference itself gives something else for each, but for a window that every example fits."""
    torch.manual_seed(0)
    states, cu_seqlens = random_states((6, 2), 230, 32, torch.float64), boundaries([30, 200])
    plain = attention.reference(*states, cu_seqlens, 0.5)
    for rule in RULES:
        rule = rule.get("sliding_window", 0), rule.get("softcap", 0.0), rule.get("s_aux")
        change = (attention.reference(*states, cu_seqlens, 0.5, *rule) - plain).norm() / plain.norm()
        assert change == 0 if rule == (1000, 0.0, None) else change > 1e-3, rule


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [66, 67, 4096])
def test_a_window_that_every_example_fits_changes_no_byte(way: str, dtype: torch.dtype, window: int) -> None:
    if way == "c":
        in_c(dtype, 16)
    torch.manual_seed(0)
    lengths = [7, 66, 1]
    states, weight = random_states((4, 2), sum(lengths), 16, dtype), torch.randn(sum(lengths), 4, 16).to(dtype)
    with_window = value_and_gradients(states, weight, boundaries(lengths), sliding_window=window)
    without = value_and_gradients(states, weight, boundaries(lengths))
    assert all(torch.equal(a, b) for a, b in zip(with_window, without, strict=True))


@pytest.mark.parametrize("rule", [{}, *RULES], ids=name_of)
@pytest.mark.parametrize("heads", [(6, 2), (6, 6)])
def test_boundaries_that_are_not_read_give_the_same(
    heads: tuple[int, int], rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU without a kernel; the row is longer than a block."""
    monkeypatch.setattr(attention, "_is_read", lambda boundaries: False)
    monkeypatch.setattr(attention, "BLOCK_ON_GPU", 64)
    torch.manual_seed(0)
    lengths = [7, 1, 100, 66]
    states, weight = random_states(heads, sum(lengths), 32, torch.float64), torch.randn(sum(lengths), 6, 32)
    ours = value_and_gradients(states, weight, boundaries(lengths), scaling=0.5, **rule)
    plain = plain_value_and_gradients(states, weight, boundaries(lengths), scaling=0.5, **rule)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", [RULES[2], RULES[-1], {"s_aux": SINKS, "softcap": 5.0}], ids=name_of)
def test_changing_one_example_leaves_the_gradients_of_others(way: str, dtype: torch.dtype, rule: dict) -> None:
    if way == "c":
        in_c(dtype, 32)
    torch.manual_seed(0)
    lengths = [70, 65, 3]
    states, weight = random_states((6, 2), sum(lengths), 32, dtype), torch.randn(sum(lengths), 6, 32).to(dtype)
    before = value_and_gradients(states, weight, boundaries(lengths), **rule)
    for x in (*states, weight.transpose(0, 1)):
        x[:, 70:135] = torch.randn_like(x[:, 70:135])
    after = value_and_gradients(states, weight, boundaries(lengths), **rule)
    for a, b in zip([before[0].transpose(0, 1), *before[1:]], [after[0].transpose(0, 1), *after[1:]], strict=True):
        assert torch.equal(a[:, :70], b[:, :70]) and torch.equal(a[:, 135:], b[:, 135:])
        assert not torch.equal(a[:, 70:135], b[:, 70:135])


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
    for rule in ({}, {"sliding_window": 29, "softcap": 2.0, "s_aux": SINKS}):
        ours = value_and_gradients(states, weight, boundaries(lengths), **rule)
        assert_near(ours, plain_value_and_gradients(states, weight, boundaries(lengths), **rule), dtype)


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [1, 6, 60, 96, 191, 192, 193, 400])
def test_blocks_outside_the_window(window: int, dtype: torch.dtype) -> None:
    """An example of several blocks of the backward pass, some of which no query of another sees."""
    in_c(dtype, 16)
    torch.manual_seed(window)
    states, weight = random_states((2, 1), 500, 16, dtype), torch.randn(500, 2, 16).to(dtype)
    ours = value_and_gradients(states, weight, boundaries([500]), sliding_window=window)
    assert_near(ours, plain_value_and_gradients(states, weight, boundaries([500]), sliding_window=window), dtype)


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("cap", [1.0, 50.0])
def test_capped_scores_are_as_near_their_tanh_as_fp32(cap: float) -> None:
    """Each token is an example of its own, so its score is all that the log-sum-exp has in it."""
    in_c(torch.float32, 16)
    scores = torch.cat([torch.logspace(-30, 4, 2000), torch.linspace(0.3, 1.2, 2000)])
    scores = torch.cat([scores, -scores, torch.zeros(1)])
    q, k = torch.zeros(1, len(scores), 16), torch.ones(1, len(scores), 16)
    q[0, :, 3] = scores
    _, lse = kernel.forward(q, k, k, torch.arange(len(scores) + 1), 1.0, cap=cap)
    exact = cap * torch.tanh(scores.double() / cap) / math.log(2)
    torch.testing.assert_close(lse[0].double(), exact, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sink", [-math.inf, -1e4, 1e4])
def test_sinks_of_any_size(sink: float, dtype: torch.dtype) -> None:
    in_c(dtype, 16)
    torch.manual_seed(0)
    states, cu_seqlens = random_states((2, 2), 40, 16, dtype), boundaries([40])
    plain, _ = kernel.forward(*states, cu_seqlens, 1.0)
    out, _ = kernel.forward(*states, cu_seqlens, 1.0, sinks=torch.full((2,), sink))
    assert torch.equal(out, plain) if sink < 0 else not out.any()


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
    clean, _ = kernel.forward(q, k, v, cu_seqlens, 1.0, window=7)
    out, _ = kernel.forward(q, k_bad, v, cu_seqlens, 1.0, window=7)
    assert out[25:32].isnan().all() and torch.equal(out[:25], clean[:25]) and torch.equal(out[32:], clean[32:])


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", [{}, RULES[-1]], ids=name_of)
def test_any_number_of_threads_gives_the_same_bytes(dtype: torch.dtype, rule: dict[str, Any]) -> None:
    in_c(dtype, 64)
    torch.manual_seed(0)
    lengths, before = [300, 5, 120, 64, 1], torch.get_num_threads()
    states, weight = random_states((6, 3), sum(lengths), 64, dtype), torch.randn(sum(lengths), 6, 64).to(dtype)
    results = []
    try:
        for threads in (1, 2, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(states, weight, boundaries(lengths), **rule))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", [{}, RULES[-1]], ids=name_of)
def test_gradients_of_an_example_do_not_depend_on_its_neighbours(dtype: torch.dtype, rule: dict[str, Any]) -> None:
    in_c(dtype, 64)
    torch.manual_seed(0)
    lengths = [97, 203, 31]
    states, weight = random_states((6, 2), sum(lengths), 64, dtype), torch.randn(sum(lengths), 6, 64).to(dtype)
    alone = value_and_gradients([t[:, 97:300] for t in states], weight[97:300], boundaries([203]), **rule)
    for t in (*states, weight.transpose(0, 1)):
        t[:, :97], t[:, 300:] = float("nan"), float("inf")
    packed = value_and_gradients(states, weight, boundaries(lengths), **rule)
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
    out, _ = attention.packed_attention(
        torch.nn.Module(), *ours, None, scaling=0.3, cu_seqlens=cu_seqlens, longest=max(lengths)
    )
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
        out, _ = attention.packed_attention(
            torch.nn.Module(), q, k, v, None, cu_seqlens=cu_seqlens, longest=max(lengths)
        )
        (out[0] * weight.to(dtype)).sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for true, rounded in zip(*results, strict=True):
        # probabilities, their gradient and the result are each rounded to 8 bits of mantissa
        assert float((rounded.double() - true).norm() / true.norm()) < 4 * 2**-8


@pytest.mark.parametrize("size", [8, 16])
def test_the_operator_is_known_to_compile(size: int) -> None:
    args = (torch.randn(4, 70, size), torch.randn(2, 70, size), torch.randn(2, 70, size))
    args = (*(t.requires_grad_() for t in args), torch.tensor([0, 3, 70]), 67, 0.3)
    torch.library.opcheck(torch.ops.huarizo.packed_attention.default, (*args, 5, 2.0, torch.zeros(4)))


def test_it_compiles_whole() -> None:
    """Without a break of the graph, once for each rule, and with the same result."""

    class Layer(torch.nn.Module):
        def __init__(self, window: int | None, cap: float | None, sinks: torch.Tensor | None) -> None:
            super().__init__()
            self.rule = {"sliding_window": window, "softcap": cap, "s_aux": sinks}

        def forward(self, x: torch.Tensor, **of_batch: Any) -> torch.Tensor:
            return attention.packed_attention(self, x, x, x, None, **of_batch, **self.rule)[0] * 2  # pyright: ignore

    x, cu_seqlens = torch.randn(1, 2, 30, 16, requires_grad=True), boundaries([10, 20])
    for rule in ((None, None, None), (4, None, None), (3, 2.0, torch.zeros(2))):
        layer, results = Layer(*rule), []
        for forward in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            out = forward(x, cu_seqlens=cu_seqlens, longest=20)
            results.append([out, *torch.autograd.grad(out.square().sum(), x)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_generation_without_boundaries_is_refused() -> None:
    model = make_model()
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(torch.tensor([[5, 6]]))


def test_what_transformers_passes_of_a_llama_is_taken() -> None:
    x, examples = torch.randn(1, 2, 5, 16), {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32), "longest": 3}
    plain, _ = attention.packed_attention(torch.nn.Module(), x, x, x, None, **examples)
    out, _ = attention.packed_attention(
        torch.nn.Module(), x, x, x, None, **examples, scaling=16**-0.5, dropout=0.0, use_cache=False,
        position_ids=torch.arange(5)[None], num_items_in_batch=torch.tensor(3), output_attentions=False,
        sliding_window=None, softcap=None, s_aux=None, is_causal=True,
    )  # fmt: skip
    assert torch.equal(out, plain)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"sliding_window": -1}, "sliding_window=-1"), ({"sliding_window": (3, 0)}, r"sliding_window=\(3, 0\)"),
        ({"softcap": -50.0}, "softcap=-50.0"), ({"softcap": math.inf}, "softcap=inf"),
        ({"s_aux": torch.zeros(3)}, r"s_aux of shape \(3,\)"), ({"s_aux": 1.0}, "s_aux=1.0"),
        ({"s_aux": torch.zeros(2, requires_grad=True)}, "gradient of s_aux, which must be frozen"),
        ({"sinks": torch.zeros(2)}, "sinks"), ({"dropout": 0.1}, "dropout=0.1"),
        ({"position_bias": torch.zeros(1)}, "position_bias"), ({"is_causal": False}, "is_causal=False"),
        ({"output_attentions": True}, "output_attentions=True"), ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"never_heard_of": 1}, "never_heard_of=1"),
    ],
    ids=str,
)  # fmt: skip
def test_another_attention_is_refused_by_name(asked: dict[str, Any], named: str) -> None:
    x, examples = torch.randn(1, 2, 5, 16), {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32), "longest": 3}
    with pytest.raises(ModelError, match=f"packed attention has no {named}$"):
        attention.packed_attention(torch.nn.Module(), x, x, x, None, **examples, **asked)


def test_masks_and_attention_both_ways_are_refused() -> None:
    x, examples = torch.randn(1, 2, 5, 16), {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32), "longest": 3}
    with pytest.raises(ModelError, match="attention_mask"):
        attention.packed_attention(torch.nn.Module(), x, x, x, torch.zeros(1, 1, 5, 5), **examples)
    encoder = torch.nn.Module()
    encoder.is_causal = False
    with pytest.raises(ModelError, match="is_causal=False"):
        attention.packed_attention(encoder, x, x, x, None, **examples)
    out, _ = attention.packed_attention(encoder, x, x, x, None, **examples, is_causal=True)
    assert out.shape == (1, 5, 2, 16)


def test_sinks_to_be_trained_are_taken_where_nothing_is_trained() -> None:
    x, examples = torch.randn(1, 2, 5, 16), {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32), "longest": 3}
    with torch.no_grad():
        out, _ = attention.packed_attention(
            torch.nn.Module(), x, x, x, None, **examples, s_aux=torch.zeros(2, requires_grad=True)
        )
    assert out.isfinite().all()


SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHERS = {
    "mistral": {},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2},
}
"""What makes a model of each type use a window of 5 in one layer at least, a cap where it has one, and sinks."""


@pytest.mark.parametrize("model_type", OTHERS)
def test_models_equal_transformers_own_attention(model_type: str) -> None:
    """Value and gradient of the input's embeddings, packed, and each example alone with Transformers' eager attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **OTHERS[model_type])
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight", "sinks")):
            parameter.normal_(std=0.3)  # as drawn, scores are too small for a cap or a sink to show
    lengths = [3, 17, 1, 9]
    embeddings, results = torch.randn(1, sum(lengths), 32, requires_grad=True), []
    model.set_attn_implementation(attention.NAME)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    boundaries_of_row = {"cu_seqlens": boundaries(lengths), "longest": max(lengths)}
    packed = model(inputs_embeds=embeddings, position_ids=positions, **boundaries_of_row, use_cache=False)
    model.set_attn_implementation("eager")
    parts = embeddings.split(lengths, dim=1)
    alone = torch.cat([model(inputs_embeds=part, use_cache=False).logits for part in parts], dim=1)
    weight = torch.randn_like(alone)
    for logits in (packed.logits, alone):
        results.append([logits.detach(), *torch.autograd.grad((logits * weight).sum(), embeddings)])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
