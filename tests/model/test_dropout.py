"""The hashed dropout drops the share it should, and its masks are one definition with and without a kernel."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from huarizo.data.packing import StepCollator
from huarizo.kernels import dropout as kernel
from huarizo.model import dropout
from huarizo.model.dropout import DropoutMasks, HashedDropout, at_places, hashed, reference
from tests.model.test_compile import compiles

SEED = torch.tensor([987654321], dtype=torch.int32)


def places_of(tokens: int) -> torch.Tensor:
    """Places as micro-batches have them: not from zero, and with a gap."""
    return (torch.arange(tokens) * 3 // 2 + 5).int()


def in_units(count: int, seed: int) -> torch.Tensor:
    """Hashes as numbers in [0, 1)."""
    bits = hashed(torch.arange(count).int(), torch.tensor([seed], dtype=torch.int32))
    return (bits.long() & 0xFFFFFFFF).double() / 2**32


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of computing: the kernel where there is one, and plain torch."""
    if request.param == "torch":
        monkeypatch.setattr(dropout, "_in_c", lambda x: False)
    elif reason := kernel.reason_against(torch.float32):
        pytest.skip(reason)
    return request.param


def test_the_hash_is_uniform_and_its_streams_unrelated() -> None:
    first, second = (in_units(2**20, seed) for seed in (1, 2))
    for stream in (first, second):
        assert float(stream.mean()) == pytest.approx(0.5, abs=2e-3)
        assert float(stream.var()) == pytest.approx(1 / 12, rel=5e-3)
        counts = torch.histc(stream, 64, 0, 1)
        assert float(((counts - 2**14) ** 2 / 2**14).sum()) < 120  # chi-square of 63 degrees of freedom: 1e-5
    for a, b in ((first[:-1], first[1:]), (first, second), (first[:-2048], first[2048:]), (first[1:], second[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5e-3


def test_the_hash_is_the_one_of_32_bit_integers() -> None:
    index, seed = [0, 1, 575, 2**31 - 1, -(2**31), -7], -123456789
    wanted = []
    for x in index:
        x &= 0xFFFFFFFF
        for multiplier in (0x21F0AAAD, 0x735A2D97, 0x21F0AAAD):
            x = (x ^ (x >> 16)) * multiplier & 0xFFFFFFFF
            x = (x ^ (x >> 15)) + seed & 0xFFFFFFFF
        wanted.append(x)
    found = hashed(torch.tensor(index, dtype=torch.int32), torch.tensor([seed], dtype=torch.int32))
    assert (found.long() & 0xFFFFFFFF).tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_equals_the_reference_in_value_and_gradient(way: str, dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 67, 33).to(dtype).requires_grad_()
    places = places_of(3 * 67)
    y = HashedDropout(p, SEED, places)(x)
    y.sum().backward()
    assert torch.equal(y.flatten(0, 1), reference(x.detach().flatten(0, 1), places, SEED, p))
    ones = torch.ones(3 * 67, 33, dtype=dtype)
    assert x.grad is not None and torch.equal(x.grad.flatten(0, 1), reference(ones, places, SEED, p))
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "rank"), [(1, 16, 1), (3, 33, 3), (70, 100, 8), (5, 576, 65), (66, 2048, 16)]
)
def test_a_linear_layer_behind_it(way: str, rows: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rank)
    x, weight, grad = torch.randn(rows, inputs).to(dtype), torch.randn(rank, inputs), torch.randn(rows, rank).to(dtype)
    module = HashedDropout(0.2, SEED, places_of(rows))
    exact = [t.double().requires_grad_() for t in (x, weight.to(dtype))]
    keep = dropout.kept(places_of(rows), inputs, SEED, 0.2)
    wanted = F.linear(torch.where(keep, exact[0] / 0.8, 0), exact[1])
    wanted.backward(grad.double())
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    y = module.linear(ours[0], ours[1])
    y.backward(grad)
    assert y.dtype == dtype and ours[0].grad is not None and ours[1].grad is not None
    assert ours[0].grad.dtype == dtype and ours[1].grad.dtype == torch.float32
    for actual, expected in ((y, wanted), (ours[0].grad, exact[0].grad), (ours[1].grad, exact[1].grad)):
        assert expected is not None
        fused = way == "kernel" and rank <= dropout.THIN
        tolerance = 1e-6 if actual.dtype == torch.float32 and (fused or dtype == torch.float32) else 8e-3
        assert float((actual.double() - expected).norm()) <= tolerance * float(expected.norm())
    assert not ours[0].grad[~keep].any()
    assert torch.equal(module.eval().linear(x, weight), F.linear(x, weight.to(dtype)))


def on_this_tier(
    rows: int, inputs: int, rank: int, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], tuple[int, int, float], torch.Tensor]:
    """x, weight, gradient and places; the kernel's seed, threshold and scale for a share of 0.2; what is kept."""
    if reason := kernel.reason_against(dtype):
        pytest.skip(reason)
    torch.manual_seed(rows + inputs)
    tensors = torch.randn(rows, inputs).to(dtype), torch.randn(rank, inputs), torch.randn(rows, rank).to(dtype)
    mask = int(SEED) & 0xFFFFFFFF, int(0.2 * 2**32), 1 / (1 - 0.2)
    return (*tensors, places_of(rows)), mask, dropout.kept(places_of(rows), inputs, SEED, 0.2)


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("inputs", "rank"), [(1, 1), (7, 2), (8, 8), (9, 3), (15, 4), (16, 5), (17, 16), (33, 33), (100, 1), (577, 8)]
)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 11, 12, 13, 31, 32, 33])
def test_every_tier_equals_the_definition(rows: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    (x, weight, grad, places), mask, keep = on_this_tier(rows, inputs, rank, dtype)
    kept_x = torch.where(keep, x.double() / 0.8, 0)
    assert torch.equal(kernel.dropped(x, places, *mask), reference(x, places, SEED, 0.2))
    h = kernel.down(x, weight, places, *mask)
    grad_x, grad_weight = kernel.down_backward(grad, x, weight, places, *mask)
    rounded, grad = weight.to(dtype).double(), grad.double()
    for ours, left, right in ((h, kept_x, rounded.T), (grad_x, grad / 0.8, rounded), (grad_weight, grad.T, kept_x)):
        wrong = ours.double() - torch.where(keep, left @ right, 0) if ours is grad_x else ours.double() - left @ right
        tolerance = 1e-6 if ours.dtype == torch.float32 else 4e-3
        assert bool((wrong.abs() <= tolerance * (left.abs() @ right.abs())).all())
    assert not grad_x[~keep].any()


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_row_alone_and_nothing_where_it_is_dropped(
    bad: float, dtype: torch.dtype
) -> None:
    (x, weight, grad, places), mask, keep = on_this_tier(13, 45, 3, dtype)
    clean, clean_grads = kernel.down(x, weight, places, *mask), kernel.down_backward(grad, x, weight, places, *mask)
    for dropped in (True, False):
        column = int((keep[6] != dropped).nonzero()[0])
        spoiled = x.clone()
        spoiled[6, column] = bad
        h = kernel.down(spoiled, weight, places, *mask)
        grad_x, grad_weight = kernel.down_backward(grad, spoiled, weight, places, *mask)
        others, columns = torch.arange(13) != 6, torch.arange(45) != column
        assert torch.equal(h[others], clean[others]) and torch.equal(grad_x, clean_grads[0])
        assert torch.equal(grad_weight[:, columns], clean_grads[1][:, columns])
        assert bool(h[6].isfinite().all()) == bool(grad_weight.isfinite().all()) == dropped


@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_layer_is_the_same_on_any_number_of_threads(dtype: torch.dtype) -> None:
    if reason := kernel.reason_against(dtype):
        pytest.skip(reason)
    x, weight, grad = torch.randn(2, 45, 300).to(dtype)[:, :, 7:250], torch.randn(9, 243), torch.randn(90, 9).to(dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = HashedDropout(0.1, SEED, places_of(90)).linear(*leaves)
        y.backward(grad.view_as(y))
        results.append((y, leaves[0].grad, leaves[1].grad))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_what_does_not_fit_is_refused_by_the_kernel() -> None:
    if reason := kernel.reason_against(torch.float32):
        pytest.skip(reason)
    x = torch.randn(4, 20)
    for weight in (torch.randn(3, 21), torch.randn(3, 20).bfloat16()):
        with pytest.raises(ValueError, match=r"dropout_down wants torch.float32 \(3, 20\)"):
            HashedDropout(0.1, SEED, places_of(4)).linear(x, weight)
    for places in (places_of(3), places_of(4).long()):
        with pytest.raises(ValueError, match=r"dropout wants torch.int32 \(4,\)"):
            HashedDropout(0.1, SEED, places)(x)


def test_the_compiler_sees_the_right_shapes(way: str) -> None:
    if way == "torch":
        pytest.skip("plain torch needs no shapes of its own")
    x, weight = torch.randn(6, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True)
    mask = places_of(6), SEED, *dropout.share(0.5, x.device)
    torch.library.opcheck(torch.ops.huarizo.dropped_linear.default, (x, weight, *mask))


@compiles
def test_a_compiler_makes_the_same_mask_for_any_share() -> None:
    x, places = torch.randn(50, 64), places_of(50)
    for p in (0.05, 0.1, 0.3, 0.5):
        module = nn.Sequential(HashedDropout(p, SEED, places)).train()
        module.compile(dynamic=True)
        assert torch.equal(module(x), reference(x, places, SEED, p))


def test_evaluation_passes_everything() -> None:
    x = torch.randn(4, 5)
    assert HashedDropout(0.5, SEED, places_of(4)).eval()(x) is x


def test_masks_are_a_function_of_seed_layer_step_and_place() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.3)), nn.Dropout(0.0))

    x, places = torch.ones(50, 64), places_of(50)

    def masks(seed: int, step: int) -> list[torch.Tensor]:
        one = model()
        DropoutMasks(one, seed).draw(step, places)
        found = [module for module in one.modules() if isinstance(module, HashedDropout)]
        torch.rand(7)  # torch's own generator has no say
        return [module(x) for module in found]

    first = masks(seed=5, step=3)
    assert len(first) == 2 and not torch.equal(*first)
    assert all(torch.equal(a, b) for a, b in zip(first, masks(seed=5, step=3), strict=True))
    for others in (masks(seed=6, step=3), masks(seed=5, step=4)):
        assert not any(torch.equal(a, b) for a, b in zip(first, others, strict=True))
    one = model()
    assert not any("seed" in name or "places" in name for name in [*one.state_dict(), *dict(one.named_buffers())])


def test_a_micro_batch_of_more_tokens_than_expected_has_room() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    masks = DropoutMasks(model, seed=1)
    masks.draw(0, torch.arange(3 * dropout.CAPACITY))
    assert model[1](torch.ones(3 * dropout.CAPACITY, 2)).shape == (3 * dropout.CAPACITY, 2)


@pytest.mark.parametrize(("processes", "budget"), [(1, 100), (1, 9), (1, 4), (2, 100), (3, 4), (5, 4)])
def test_a_token_has_one_mask_however_the_step_is_cut_and_dealt_out(processes: int, budget: int) -> None:
    examples = [{"input_ids": [i] * length, "labels": [1] * length} for i, length in enumerate((5, 3, 4, 2))]
    found: dict[int, list[torch.Tensor]] = {}
    for rank in range(processes):
        step = StepCollator(rank, processes)(examples)
        for batch in step.micro_batches(budget):
            model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
            DropoutMasks(model, seed=1).draw(7, batch.places)
            for token, row in zip(batch.input_ids[0].tolist(), model[1](torch.ones(14, 32)), strict=False):
                found.setdefault(token, []).append(row)
    whole = reference(torch.ones(14, 32), torch.arange(14).int(), _seed_of_step_7(), 0.5)
    rows = [row for token in range(4) for row in found[token][: len(examples[token]["input_ids"])]]
    assert torch.equal(torch.stack(rows), whole)


def _seed_of_step_7() -> torch.Tensor:
    return hashed(torch.tensor([7], dtype=torch.int32), torch.tensor([1], dtype=torch.int32))


def test_a_head_sees_the_places_of_its_labels() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    DropoutMasks(model, seed=1).draw(0, torch.arange(20))
    x = torch.ones(20, 8)
    whole, some = model[1](x), torch.tensor([3, 4, 11])
    with at_places(model, some):
        assert torch.equal(model[1](x[:3]), whole[some])
    assert torch.equal(model[1](x), whole)


def test_a_lora_on_the_head_is_dropped_alike_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huarizo.model import loss
    from huarizo.model.load import load_base
    from huarizo.model.lora import add_lora
    from huarizo.recipe import make_recipe
    from tests.model.test_compile import BATCHES
    from tests.tiny import make_model

    make_model(initializer_range=0.1).save_pretrained(tmp_path)
    recipe = make_recipe(lora={"dropout": 0.3, "target_modules": ["lm_head"]}).lora
    model = add_lora(load_base(tmp_path, torch.float32, torch.device("cpu")), recipe, seed=1).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    DropoutMasks(model, seed=1).draw(0, BATCHES[0].places)
    whole = float(loss.PackedLoss(model.get_base_model())(model, BATCHES[0]).detach())
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1)
    assert float(loss.PackedLoss(model.get_base_model())(model, BATCHES[0]).detach()) == pytest.approx(whole, rel=1e-6)
