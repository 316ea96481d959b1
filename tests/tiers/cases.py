"""What every tier must compute: value and gradient of each kernel, against the references in float64.

A case is a function that calls the bindings on random inputs, raises an AssertionError where a result is wrong, and
returns the results that must have the same bytes on every tier. drivers.py decides which tier the bindings call.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from huarizo.kernels import attention as attention_kernel
from huarizo.kernels import dropout as dropout_kernel
from huarizo.kernels import int8 as int8_kernel
from huarizo.model import attention, dropout
from huarizo.model.frozen.int8 import BLOCK, Int8Linear, quantise, reference, reference_gradient, rotated
from huarizo.model.frozen.linear import LowRank

DTYPES = (torch.bfloat16, torch.float32)
ROWS = (0, 1, 11, 12, 13, 31, 32, 33)
THREADS = (1, 2, 3, 4, 7)
BAD = (float("nan"), float("inf"))
# the norm of what may be wrong over the norm of what is right: a few roundings of the dtype, and of attention's sums
INT8 = {torch.bfloat16: 3e-3, torch.float32: 1e-6}
LORA = {torch.bfloat16: 5e-3, torch.float32: 1e-6}  # B is rounded as well
FAR = 3e-2  # of an int8 row with other integers
ATTENTION = {torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps, torch.float32: 16 * torch.finfo(torch.float32).eps}
DROPOUT = {torch.bfloat16: 4e-3, torch.float32: 1e-6}
SEED, SHARE = 987654321, 0.2
MASK = SEED, int(SHARE * 2**32), 1 / (1 - SHARE)
Results = list[torch.Tensor]
Rule = tuple[int, float, bool]  # a window, a cap, and whether there are sinks
PLAIN: Rule = (0, 0.0, False)


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    wrong, right = float((actual.double() - expected).norm()), float(expected.norm())
    assert wrong <= tolerance * right, f"{wrong / right if right else wrong:.2e} instead of {tolerance:.2e}"


def near_by_rows(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Few rows may be further off: a number within fp32's precision of halfway between two integers goes either way,
    and so does the last bit of a row's scale, from which the noise of its gradient starts."""
    assert actual.shape == expected.shape
    wrong, right = (actual.double() - expected).norm(dim=1), expected.norm(dim=1)
    far = int((wrong > tolerance * right).sum())
    assert far <= 1 + len(right) // 10, f"{far} of {len(right)} rows are further off than {tolerance:.2e}"
    assert bool((wrong <= FAR * right).all()), f"a row is further off than {FAR:.2e}"


def same(first: Results, second: Results) -> None:
    assert all(same_bytes(a, b) for a, b in zip(first, second, strict=True)), "other bytes"


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def on_any_threads(compute: Callable[[], Results]) -> Results:
    """The results, which must not depend on the number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        same(results[0], other)
    return results[0]


# ---------------------------------------------------------------------------------------------------------------- int8


def layer_of(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> Int8Linear:
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    return quantise([linear], torch.rand(inputs) + 0.5)[0]


def int8_results(layer: Int8Linear, x: torch.Tensor, grad: torch.Tensor) -> Results:
    """Value, gradient, quantised rows and their scales."""
    rows = int8_kernel.quantise(x, layer.input_scale)
    return [layer(x), layer.input_gradient(grad), rows[0], rows[1]]


def low_rank_of(rows: int, outputs: int, rank: int, dtype: torch.dtype) -> LowRank:
    return LowRank(torch.randn(rows, rank).to(dtype), torch.randn(outputs, rank))


def int8_results_of(inputs: int, outputs: int, rows: int, rank: int, bias: bool, dtype: torch.dtype) -> Results:
    """Without a comparison; rows of x and of the gradient lie apart, and begin anywhere."""
    layer = layer_of(inputs, outputs, dtype, bias)
    x, grad = torch.randn(rows, inputs + 5).to(dtype), torch.randn(rows, outputs + 3).to(dtype)
    x, grad, low_rank = x[:, 2 : inputs + 2], grad[:, 1 : outputs + 1], low_rank_of(rows, outputs, rank, dtype)
    term = [layer(x, low_rank), *dropout_kernel.up_backward(grad, *low_rank)] if rank else []
    return int8_results(layer, x, grad) + term


def int8_equals_the_reference(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> Results:
    layer = layer_of(inputs, outputs, dtype, bias=rows % 2 == 1)
    x, grad = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    if rows:
        x[rows // 2], grad[rows // 2] = 0, 0
    results = int8_results(layer, x, grad)
    near_by_rows(results[0], reference(x, layer), INT8[dtype])
    near_by_rows(results[1], reference_gradient(grad, layer), INT8[dtype])
    return results if dtype == torch.float32 else results[2:]


def int8_with_a_lora(rows: int, rank: int, dtype: torch.dtype) -> Results:
    """The term of a LoRA is added, and has its gradients."""
    layer, x, grad = layer_of(65, 71, dtype), torch.randn(rows, 65).to(dtype), torch.randn(rows, 71).to(dtype)
    h, up = low_rank = low_rank_of(rows, 71, rank, dtype)
    y, (grad_h, grad_up) = layer(x, low_rank), dropout_kernel.up_backward(grad, *low_rank)
    exact_h, exact_up = h.double(), up.to(dtype).double()
    near_by_rows(y, reference(x, layer) + exact_h @ exact_up.t(), LORA[dtype])
    near(grad_h, grad.double() @ exact_up, DROPOUT[dtype])
    near(grad_up, grad.double().t() @ exact_h, DROPOUT[torch.float32])
    return [y] if dtype == torch.float32 else []


def int8_threads(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> Results:
    layer = layer_of(inputs, outputs, dtype)
    x, grad = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    results = on_any_threads(lambda: int8_results(layer, x, grad))
    return results if dtype == torch.float32 else results[2:]


def int8_bad_rows(bad: float, channel: int, dtype: torch.dtype) -> Results:
    """A row with a NaN or an infinity becomes NaN, and no other changes."""
    layer = layer_of(100, 70, dtype)
    x, grad = torch.randn(33, 100).to(dtype), torch.randn(33, 70).to(dtype)
    clean = int8_results(layer, x, grad)[:2]
    x[2, channel], grad[2, channel % 70] = bad, bad
    others = torch.arange(33) != 2
    for before, after in zip(clean, int8_results(layer, x, grad)[:2], strict=True):
        assert after[2].isnan().all()
        same([before[others]], [after[others]])
    return []


def int8_every_integer(inputs: int, outputs: int) -> Results:
    """-127 to 127 at every place of a row, times -128 to 127 at every place of a weight: integers and sums are exact.

    outputs: a multiple of BLOCK.
    """
    places = torch.arange(inputs)
    integers = ((torch.arange(255)[:, None] + places) % 255 - 127).to(torch.int8)
    weight = ((torch.arange(outputs)[:, None] * 7 + places) % 256 - 128).to(torch.int8)
    x = rotated(integers.double() / BLOCK).float()
    rows = int8_kernel.quantise(x, torch.ones(inputs))
    assert torch.equal(rows[0][:, :inputs], integers) and not rows[0][:, inputs:].any()
    nothing, empty = torch.empty(0, dtype=torch.int64), int8_kernel.packed(torch.empty(outputs, 0))
    panels = int8_kernel.packed(weight), torch.ones(outputs), x, nothing, empty, None, outputs
    y = int8_kernel.forward(rows[0], torch.ones(255), rows[2], *panels)
    exact = integers.double() @ weight.double().t()
    assert torch.allclose(rotated(y.double()) / BLOCK, exact, rtol=0, atol=2.0)
    grad_x = int8_kernel.backward(rotated(y.double()).float(), *panels[:2], torch.ones(inputs))
    return [*rows, y, grad_x]


# ----------------------------------------------------------------------------------------------------------- attention


def attention_states(
    heads: int, kv_heads: int, lengths: list[int], size: int, dtype: torch.dtype
) -> tuple[Results, torch.Tensor, torch.Tensor]:
    """q, k, v; the gradient of the result, [T, H, D]; the boundaries."""
    total, ends = sum(lengths), list(itertools.accumulate(lengths))
    states = [torch.randn(count, total, size).to(dtype) for count in (heads, kv_heads, kv_heads)]
    return states, torch.randn(total, heads, size).to(dtype), torch.tensor([0, *ends], dtype=torch.int32)


def sinks_of(heads: int, rule: Rule) -> torch.Tensor | None:
    return torch.linspace(-3, 3, heads) if rule[2] else None


def attention_results(states: Results, grad: torch.Tensor, cu_seqlens: torch.Tensor, rule: Rule = PLAIN) -> Results:
    (q, k, v), (window, cap, _) = states, rule
    scale = q.shape[-1] ** -0.5
    out, lse = attention_kernel.forward(q, k, v, cu_seqlens, scale, window, cap, sinks_of(len(q), rule))
    return [out, *attention_kernel.backward(grad, q, k, v, out, lse, cu_seqlens, scale, window, cap)]


def attention_results_of(
    heads: int, kv_heads: int, lengths: list[int], size: int, dtype: torch.dtype, rule: Rule
) -> Results:
    """Without a comparison; tokens lie apart."""
    states, grad, cu_seqlens = attention_states(heads, kv_heads, lengths, size, dtype)
    states = [state.transpose(0, 1).contiguous().transpose(0, 1) for state in states]
    return attention_results(states, grad, cu_seqlens, rule)


def attention_equals_the_reference(
    heads: int, kv_heads: int, lengths: list[int], size: int, dtype: torch.dtype, rule: Rule = PLAIN
) -> Results:
    states, grad, cu_seqlens = attention_states(heads, kv_heads, lengths, size, dtype)
    results = attention_results(states, grad, cu_seqlens, rule)
    q, k, v = (state.double().requires_grad_() for state in states)
    out = attention.reference(q, k, v, cu_seqlens, size**-0.5, *rule[:2], sinks_of(heads, rule))
    expected = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())]
    for actual, exact in zip(results, expected, strict=True):
        near(actual, exact, ATTENTION[dtype])
    return []


def attention_threads(lengths: list[int], dtype: torch.dtype, rule: Rule) -> Results:
    states, grad, cu_seqlens = attention_states(6, 3, lengths, 48, dtype)
    on_any_threads(lambda: attention_results(states, grad, cu_seqlens, rule))
    return []


def attention_in_a_wide_window(dtype: torch.dtype) -> Results:
    """A window that every example fits gives the same bytes as none."""
    states, grad, cu_seqlens = attention_states(4, 2, [33, 7, 40], 32, dtype)
    same(attention_results(states, grad, cu_seqlens), attention_results(states, grad, cu_seqlens, (40, 0.0, False)))
    return []


def attention_caps(dtype: torch.dtype) -> Results:
    """The score of a token's only key, from the smallest to the largest, is as near its tanh as fp32 can be."""
    scores = torch.cat([torch.logspace(-30, 4, 60, dtype=torch.float64), torch.linspace(0.5, 1, 30).double()])
    scores = torch.cat([scores, -scores, torch.zeros(1).double()]).to(dtype)
    q, k = torch.zeros(1, len(scores), 16, dtype=dtype), torch.ones(1, len(scores), 16, dtype=dtype)
    q[0, :, 3] = scores
    each_alone = torch.arange(len(scores) + 1, dtype=torch.int32)
    for cap in (1.0, 50.0):
        _, lse = attention_kernel.forward(q, k, k, each_alone, 1.0, 0, cap)
        exact = cap * torch.tanh(scores.double() / cap) / math.log(2)
        wrong = ((lse[0].double() - exact).abs() / exact.abs().clamp(min=1e-30)).max()
        assert wrong < 4 * torch.finfo(torch.float32).eps, f"cap {cap}: {float(wrong):.2e}"
    return []


def attention_bad_tokens(bad: float, dtype: torch.dtype) -> Results:
    """A bad token spoils its own example, from there on all of it, and no other example."""
    states, grad, cu_seqlens = attention_states(4, 2, [31, 33, 12], 32, dtype)
    clean = attention_results(states, grad, cu_seqlens)
    for state in states:
        state[:, 40] = bad
    spoiled = attention_results(states, grad, cu_seqlens)
    assert spoiled[0][40:64].isnan().all()
    same([clean[0][:31], clean[0][64:]], [spoiled[0][:31], spoiled[0][64:]])
    for before, after in zip(clean[1:], spoiled[1:], strict=True):
        same([before[:, :31], before[:, 64:]], [after[:, :31], after[:, 64:]])
    return []


# ------------------------------------------------------------------------------------------------------------- dropout


def dropout_inputs(rows: int, inputs: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight, the gradient of the product, places, and which of x are kept."""
    places = (torch.arange(rows) * 3 // 2 + 5).int()
    keep = dropout.kept(places, inputs, torch.tensor([SEED], dtype=torch.int32), SHARE)
    return (
        torch.randn(rows, inputs).to(dtype),
        torch.randn(rank, inputs),
        torch.randn(rows, rank).to(dtype),
        places,
        keep,
    )


def dropout_results(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, places: torch.Tensor) -> Results:
    """Dropout alone; a low-rank product of it; the gradients of the input and of the weight."""
    h = dropout_kernel.down(x, weight, places, *MASK)
    return [dropout_kernel.dropped(x, places, *MASK), h, *dropout_kernel.down_backward(grad, x, weight, places, *MASK)]


def dropout_results_of(rows: int, inputs: int, rank: int, dtype: torch.dtype) -> Results:
    """Without a comparison; rows of x lie apart."""
    x, weight, grad, places, _ = dropout_inputs(rows, inputs + 3, rank, dtype)
    return dropout_results(x[:, 1 : inputs + 1], weight[:, :inputs].contiguous(), grad, places)


def dropout_equals_the_reference(rows: int, inputs: int, rank: int, dtype: torch.dtype) -> Results:
    x, weight, grad, places, keep = dropout_inputs(rows, inputs, rank, dtype)
    if rows:
        x[rows // 2] = 0
    results = dropout_results(x, weight, grad, places)
    seed = torch.tensor([SEED], dtype=torch.int32)
    same(results[:1], [dropout.reference(x, places, seed, SHARE)])
    kept_x, rounded = torch.where(keep, x.double() / (1 - SHARE), 0), weight.to(dtype).double()
    near(results[1], kept_x @ rounded.t(), DROPOUT[dtype])
    near(results[2], torch.where(keep, grad.double() / (1 - SHARE) @ rounded, 0), DROPOUT[dtype])
    near(results[3], grad.double().t() @ kept_x, DROPOUT[torch.float32])
    assert not results[2][~keep].any()
    return results[:1]


def dropout_threads(dtype: torch.dtype) -> Results:
    *tensors, _ = dropout_inputs(33, 243, 9, dtype)
    return on_any_threads(lambda: dropout_results(*tensors))[:1]


def dropout_bad_numbers(bad: float, dtype: torch.dtype) -> Results:
    """What is dropped spoils nothing; what is kept spoils its row of the product and its column of the gradient."""
    x, weight, grad, places, keep = dropout_inputs(13, 45, 3, dtype)
    clean = dropout_results(x, weight, grad, places)
    for kept in (False, True):
        column = int((keep[6] == kept).nonzero()[0])
        spoiled = x.clone()
        spoiled[6, column] = bad
        results = dropout_results(spoiled, weight, grad, places)
        rows, columns = torch.arange(13) != 6, torch.arange(45) != column
        same([clean[1][rows], clean[2], clean[3][:, columns]], [results[1][rows], results[2], results[3][:, columns]])
        assert bool(results[1][6].isfinite().all()) != kept and bool(results[3].isfinite().all()) != kept
    return []


# ----------------------------------------------------------------------------------------------------------- all cases

Case = tuple[Callable[..., Results], tuple]


def int8_cases(brief: bool) -> Iterator[Case]:
    shapes = (
        [(100, 70), (33, 65), (1, 1)]
        if brief
        else [(1, 1), (3, 2), (33, 65), (64, 32), (100, 70), (257, 95), (576, 192)]
    )
    for dtype, shape, rows in itertools.product(DTYPES, shapes, (0, 1, 13) if brief else ROWS):
        yield int8_equals_the_reference, (*shape, rows, dtype)
    for dtype in DTYPES:
        yield int8_threads, (100, 200, 33, dtype)
        yield int8_threads, (65, 33, 1, dtype)
        for bad, channel in itertools.product(BAD, (0, 63, 99)):
            yield int8_bad_rows, (bad, channel, dtype)
    for dtype, rows, rank in itertools.product(DTYPES, (0, 13), (1, 8) if brief else (1, 2, 5, 16, 33)):
        yield int8_with_a_lora, (rows, rank, dtype)
    yield int8_every_integer, (288, 64)
    if not brief:
        yield int8_every_integer, (2048, 96)


def attention_cases(brief: bool) -> Iterator[Case]:
    shapes = (
        [(6, 2, [0, 1, 12, 33]), (4, 4, [])]
        if brief
        else [(6, 2, [0, 1, 12, 33]), (2, 2, [11, 13, 31, 32, 97]), (4, 4, [])]
    )
    for dtype, size, shape in itertools.product(DTYPES, (48,) if brief else (16, 32, 48, 80, 128, 240, 256), shapes):
        yield attention_equals_the_reference, (*shape, size, dtype)
    for dtype, shape in itertools.product(DTYPES, [] if brief else [(8, 1, [200, 2]), (3, 3, [0, 385, 0])]):
        yield attention_equals_the_reference, (*shape, 64, dtype)  # longer than a block of the backward pass
    windows, caps = ((5, 33), (2.0,)) if brief else ((1, 2, 5, 63, 64, 65, 100, 1000), (1.0, 30.0))
    rules = (
        [(window, 0.0, False) for window in windows if window > 1]
        + [(0, cap, False) for cap in caps]
        + [(0, 0.0, True)]
    )
    rules += [(window, caps[0], True) for window in windows]
    lengths = [12, 40] if brief else [97, 1, 0, 200, 13]
    for dtype, rule in itertools.product(DTYPES, rules):
        yield attention_equals_the_reference, (4, 2, lengths, 32, dtype, rule)
    for dtype, size in itertools.product(DTYPES, () if brief else (16, 48, 80, 128, 240, 256)):
        yield attention_equals_the_reference, (6, 2, [33, 70, 7], size, dtype, (17, 1.0, True))
    for dtype, window in itertools.product(DTYPES, () if brief else (10, 70, 192, 300)):
        yield attention_equals_the_reference, (3, 1, [500], 32, dtype, (window, 0.0, False))  # blocks wholly outside
    for dtype in DTYPES:
        yield attention_in_a_wide_window, (dtype,)
        yield attention_caps, (dtype,)
        for rule in ((20, 2.0, True),) if brief else (PLAIN, (20, 2.0, True)):
            yield attention_threads, ([33, 1] if brief else [100, 5, 64, 1, 33], dtype, rule)
        for bad in BAD:
            yield attention_bad_tokens, (bad, dtype)


def dropout_cases(brief: bool) -> Iterator[Case]:
    shapes = [(7, 2), (100, 9)] if brief else [(1, 1), (7, 2), (9, 3), (16, 5), (17, 16), (33, 32), (100, 1), (577, 8)]
    for dtype, shape, rows in itertools.product(DTYPES, shapes, (0, 1, 13) if brief else (*ROWS, 3, 4, 5)):
        yield dropout_equals_the_reference, (rows, *shape, dtype)
    for dtype in DTYPES:
        yield dropout_threads, (dtype,)
        for bad in BAD:
            yield dropout_bad_numbers, (bad, dtype)


CASES = {int8_kernel: int8_cases, attention_kernel: attention_cases, dropout_kernel: dropout_cases}


def name_of(case: Case) -> str:
    function, arguments = case
    return f"{function.__name__}({', '.join(map(str, arguments))})"
