"""Packed attention: equal to the plain definition, value and gradient, and exactly isolated."""

import pytest
import torch

from huarizo.data.packing import pack
from huarizo.model import attention
from tests.tiny import make_model

LENGTHS = [1, 2, 63, 64, 65, 511, 512]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 2], [64, 63, 65, 1]])
def test_equals_the_reference(heads: tuple[int, int], lengths: list[int]) -> None:
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
    examples = [{"input_ids": torch.randint(4, 260, (n,)), "labels": torch.full((n,), -100)} for n in LENGTHS]

    def logits(rows: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        batch = pack(rows)
        with torch.no_grad():
            out = model(batch["input_ids"], position_ids=batch["position_ids"], cu_seqlens=batch["cu_seqlens"])
        return list(out.logits[0].split(LENGTHS))

    before = logits(examples)
    for changed in range(len(examples)):
        other = [dict(example) for example in examples]
        other[changed]["input_ids"] = (examples[changed]["input_ids"] - 4 + 100) % 256 + 4
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


def test_the_operator_is_known_to_compile() -> None:
    args = (torch.randn(4, 70, 8), torch.randn(2, 70, 8), torch.randn(2, 70, 8))
    args = tuple(t.requires_grad_() for t in args)
    torch.library.opcheck(torch.ops.huarizo.packed_attention.default, (*args, torch.tensor([0, 3, 70]), 0.3))


def test_generation_without_boundaries_is_refused() -> None:
    model = make_model()
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(torch.tensor([[5, 6]]))
