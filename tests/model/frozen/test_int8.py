"""The int8 layer does what its float64 reference says, in both directions, and loads layer by layer."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from huarizo.data.packing import PackedBatch, pack
from huarizo.data.tokens import Example
from huarizo.errors import ModelError
from huarizo.model.frozen import int8
from huarizo.model.frozen import load as int8_load
from huarizo.model.frozen.int8 import BLOCK, Int8Linear, quantise, reference, reference_gradient, rotated
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.load import load_base
from huarizo.model.loss import PackedLoss, summed_loss
from tests.cpus import APPLE, AVX2, AVX512, NO_COMPILER, PI_4, PI_5, Cpu, pretend
from tests.tiny import make_model

CPU = torch.device("cpu")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def outlier_rows(count: int, width: int) -> torch.Tensor:
    """Rows with three input channels a hundred times larger than the rest."""
    x = torch.randn(count, width)
    x[:, [1, 5, width - 1]] *= 100
    return x


def made(width: int, height: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[Any, Int8Linear]:
    torch.manual_seed(width + height)
    linear = nn.Linear(width, height, bias=bias, dtype=dtype).requires_grad_(False)
    return linear, quantise([linear], outlier_rows(64, width).abs().amax(0))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "height"), [(1, 64, 96), (7, 96, 64), (16, 40, 24), (17, 65, 33), (130, 256, 48)]
)
def test_both_products_equal_the_reference(rows: int, width: int, height: int, dtype: torch.dtype) -> None:
    _, layer = made(width, height, dtype, bias=True)
    x = outlier_rows(rows, width).to(dtype).requires_grad_()
    grad = torch.randn(rows, height).to(dtype)
    y = layer(x)
    y.backward(grad)
    assert y.dtype == dtype and x.grad is not None
    # a value halfway between two steps may round either way in another dtype; bf16 keeps 8 bits of a result
    tolerance = 2e-3 if dtype == torch.float32 else 8e-3
    assert relative(y.detach(), reference(x.detach(), layer)) < tolerance
    assert relative(x.grad, reference_gradient(grad, layer)) < tolerance


def test_outliers_do_not_drown_the_rest() -> None:
    linear, layer = made(256, 128)
    x = outlier_rows(64, 256)
    assert relative(layer(x), linear(x).double()) < 0.02
    quiet = x.clone()
    quiet[:, [1, 5, 255]] = 0
    others = layer(x) - layer(x - quiet)  # what the other channels bring about beside the outliers
    assert relative(others, linear(quiet).double()) < 0.05


def test_leading_dimensions_zero_rows_and_nan() -> None:
    _, layer = made(64, 32)
    x = torch.randn(2, 3, 64)
    x[0, 1] = 0
    x[1, 2, 9] = float("nan")
    y = layer(x)
    assert y.shape == (2, 3, 32)
    assert torch.equal(y[0, 1], torch.zeros(32))
    assert y[1, 2].isnan().all() and not y[1, :2].isnan().any()


def test_layers_with_one_input_share_what_quantises_it() -> None:
    linears = [nn.Linear(64, size).requires_grad_(False) for size in (64, 16, 16)]
    first, *others = quantise(linears, torch.rand(64) + 1)
    for other in others:
        for name in ("input_scale", "inverse_smoothing", "float_channels"):
            assert getattr(other, name) is getattr(first, name)


def test_a_stored_weight_comes_back_within_half_a_step() -> None:
    linear, layer = made(64, 48)
    error = layer.dequantised() - linear.weight
    assert not error[:, layer.float_channels].any()
    smoothed = error / layer.inverse_smoothing
    smoothed[:, layer.float_channels] = 0
    assert float(rotated(rotated(smoothed).t()).abs().amax()) > 0
    assert float(smoothed.norm()) < float(layer.scale.amax()) * (smoothed.numel() ** 0.5) * BLOCK / 2


def test_the_small_part_of_a_gradient_is_not_rounded_away() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 8192, bias=False).requires_grad_(False)
    linear.weight += 0.2  # what the small entries have in common adds up
    layer = quantise([linear], torch.rand(64) + 1)[0]
    grad = torch.softmax(torch.randn(300, 8192) + 9 * F.one_hot(torch.arange(300), 8192), -1)
    wanted = grad.double() @ linear.weight.double()
    nearest, scale = int8.quantise_rows(rotated(grad) * layer.scale)
    lost = rotated(nearest.float() @ layer.plain()[0].float() * scale) * layer.inverse_smoothing
    assert relative(layer.input_gradient(grad), wanted) < 0.05 < 0.15 < relative(lost, wanted)


def test_stochastic_rounding_is_right_on_average() -> None:
    rows = torch.rand(4000, 40) * torch.linspace(0.001, 1, 40) * (1 + torch.rand(4000, 1))
    integers, scale = int8.quantise_gradient(rows)
    error = integers * scale - rows
    assert float((error.abs() / scale).max()) <= 1
    assert float((error / scale).mean(0).abs().max()) < 0.05
    again, _ = int8.quantise_gradient(rows.flip(0))
    assert torch.equal(again.flip(0), integers)  # of the row alone, not of its place


def test_rows_of_one_scale_do_not_share_their_noise() -> None:
    """Else what is lost in one row is lost in all of them, and their sum is no better than each."""
    torch.manual_seed(0)
    rows = torch.rand(500, 64) - 0.5
    rows[:, 9] = 1
    _, scale = int8.quantise_gradient(rows)
    assert float(scale.max()) == float(scale.min())
    noise = int8._noise(rows, scale)
    assert len(noise[:, 0].unique()) == 500
    assert float((noise.mean(0) - 0.5).abs().max()) < 5 / (12 * 500) ** 0.5


def test_the_loss_of_an_int8_head_has_the_gradient_of_that_head() -> None:
    _, head = made(64, 300)
    hidden, targets = torch.randn(50, 64), torch.randint(300, (50,))
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    losses = summed_loss(leaves[0], head, targets), F.cross_entropy(head(leaves[1]), targets, reduction="sum")
    for loss in losses:
        loss.backward()
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert relative(leaves[0].grad, leaves[1].grad.double()) < 0.02


def test_rotation_spreads_a_spike_and_undoes_itself() -> None:
    x = torch.randn(3, 70)
    assert torch.allclose(rotated(rotated(x))[:, :70] / BLOCK, x, atol=1e-6)
    spike = torch.zeros(64).index_fill(0, torch.tensor([37]), 1)
    assert torch.equal(rotated(spike).abs(), torch.tensor([0.0, 1.0]).repeat_interleave(BLOCK))


def calibration(lengths: tuple[int, ...] = (20, 31)) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(4, 260, (length,), generator=generator).tolist() for length in lengths]
    return pack([Example(row, row) for row in ids])


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_the_loaded_model_is_int8_and_close_to_the_float_one(config: dict[str, Any], tmp_path: Path) -> None:
    make_model(**config).save_pretrained(tmp_path)
    batch = calibration()
    quantised = load_quantised_base(tmp_path, "int8", torch.float32, CPU, batch)
    plain = load_base(tmp_path, torch.float32, CPU)
    names = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, module in quantised.named_modules() if isinstance(module, Int8Linear)} == names
    assert not any(parameter.requires_grad for parameter in quantised.parameters())
    with torch.no_grad():
        ours, theirs = (float(PackedLoss(model)(model, batch)) for model in (quantised, plain))
    assert ours == pytest.approx(theirs, rel=2e-3)


def test_the_same_rows_give_the_same_weights(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    first, second = (
        load_quantised_base(tmp_path, "int8", torch.bfloat16, CPU, calibration()).state_dict() for _ in range(2)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_one_float_layer_stands_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(num_hidden_layers=4).save_pretrained(tmp_path)
    whole: list[int] = []
    fill = int8_load._Weights.fill

    def counted(self: Any, module: nn.Module, prefix: str, **options: Any) -> None:
        fill(self, module, prefix, **options)
        models = [m for m in alive if m.model.layers]
        whole.append(sum(not m.weight.is_meta for model in models for m in model.model.layers.modules()
                         if isinstance(m, nn.Linear)))  # fmt: skip

    alive: list[Any] = []
    from transformers import LlamaForCausalLM

    made_of = LlamaForCausalLM.__init__

    def noted(self: Any, config: Any) -> None:
        made_of(self, config)
        alive.append(self)

    monkeypatch.setattr(int8_load._Weights, "fill", counted)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", noted)
    load_quantised_base(tmp_path, "int8", torch.float32, CPU, calibration())
    assert max(whole) == 7


def test_sharded_weights_load_as_one_file_does(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    one, many = (
        load_quantised_base(tmp_path / name, "int8", torch.float32, CPU, calibration()).state_dict()
        for name in ("one", "many")
    )
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    taken = weights.pop(name)
    save_file(weights, file)
    with pytest.raises(ModelError, match=name):
        load_quantised_base(tmp_path, "int8", torch.float32, CPU, calibration())
    save_file(weights | {name: taken[:5].clone()}, file)
    with pytest.raises(ModelError, match=rf"{name} has the shape \[5, 64\], but config.json requires \[96, 64\]"):
        load_quantised_base(tmp_path, "int8", torch.float32, CPU, calibration())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_quantised_base(tmp_path, "int8", torch.float32, CPU, calibration())


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load_quantised_base(tmp_path, "int8", torch.float32, CPU, calibration())


def test_a_card_gets_enough_rows_and_the_layout_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class OnCuda(torch.Tensor):
        @property
        def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
            return torch.device("cuda")

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.stride(1) == 1 and b.stride(0) == 1, "cuBLASLt multiplies rows by columns"
        seen.append(a.shape[0])
        return (a.int() @ b.int()).as_subclass(torch.Tensor)

    monkeypatch.setattr(torch.ops.aten, "_int_mm", product)
    a, b = torch.ones(3, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.int8)
    assert torch.equal(int8.int8_product(a.as_subclass(OnCuda), b), torch.full((3, 8), 8, dtype=torch.int32))
    for a, b in (
        (torch.randint(-128, 128, (20, 8), dtype=torch.int8), torch.randint(-9, 9, (8, 16), dtype=torch.int8)),
    ):
        for left in (a, a.t().contiguous().t()):
            for right in (b, b.t().contiguous().t()):
                found = int8.int8_product(left.as_subclass(OnCuda), right)
                assert torch.equal(found, (a.int() @ b.int()))
    assert seen == [17, 20, 20, 20, 20]


def test_an_index_that_is_no_json_is_a_message(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weights": {}})[:5])
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_quantised_base(tmp_path, "int8", torch.float32, CPU, calibration())


@pytest.mark.parametrize("cpu", [AVX2, AVX512, PI_4, PI_5, APPLE], ids=lambda cpu: ", ".join(sorted(cpu.flags)[:2]))
@pytest.mark.parametrize("depth", [1, 1023, 1024, 1025, 3000])
def test_a_cpu_without_int8_instructions_multiplies_exactly_in_fp32(
    cpu: Cpu, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cpu, NO_COMPILER)
    monkeypatch.setattr(torch.ops.aten, "_int_mm", lambda *_: pytest.fail("takes minutes"))
    torch.manual_seed(depth)
    extremes = torch.tensor([-127, 127], dtype=torch.int8)
    right = extremes[torch.randint(2, (depth, 5))]
    right[:, 0] = -127
    for values in ([-127, 127], [-128, 127], [-128]):
        left = torch.tensor(values, dtype=torch.int8)[torch.randint(len(values), (7, depth))]
        left[0] = values[0]
        found = int8.int8_product(left, right)
        assert found.dtype == torch.int32 and torch.equal(found, (left.long() @ right.long()).int())
        assert torch.equal(int8.int8_product(left.t().contiguous().t(), right.t().contiguous().t()), found)


def test_nothing_but_the_guarded_product_calls_torchs() -> None:
    """_int_mm takes minutes on a CPU without int8 instructions: int8_product is the only place that may call it."""
    root = Path(int8.__file__).parents[2]
    calling = [file for file in root.rglob("*.py") if "aten._int_mm" in file.read_text()]
    assert calling == [Path(int8.__file__)]
    assert inspect.getsource(int8).count("aten._int_mm") == inspect.getsource(int8.int8_product).count("aten._int_mm")
