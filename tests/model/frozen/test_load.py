"""What goes wrong while a base is quantised is told as what it is: a file, the memory, or a bug."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from huarizo.data.padding import PaddedBatch, pad
from huarizo.data.tokens import Example
from huarizo.errors import MachineError, ModelError
from huarizo.model.architectures.structure import linears_in
from huarizo.model.batching import base_of
from huarizo.model.frozen import storages
from huarizo.model.frozen.int8 import Int8Linear
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.frozen.peaks import peaks_of
from huarizo.model.load import load_base
from huarizo.model.lora import add_lora, linear_names
from huarizo.model.padded_loss import PaddedLoss
from huarizo.recipe import make_recipe
from tests.general import GENERAL, SIZES
from tests.model.frozen.test_int8 import calibration
from tests.tiny import make_model, make_tokenizer

CPU = torch.device("cpu")
LAYER = "transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward"


def load(folder: Path) -> Any:
    return load_quantised_base(folder, "int8", torch.float32, CPU, calibration())


def failing(error: Exception) -> Any:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("odd"), KeyError("x"), OSError("no")])
@pytest.mark.parametrize("place", [LAYER, "huarizo.model.frozen.int8.Int8Linear.store"])
def test_a_bug_keeps_its_own_name(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr(place, failing(error))
    with pytest.raises(type(error)) as raised:
        load(tmp_path)
    assert raised.value is error


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
@pytest.mark.parametrize("place", [LAYER, "huarizo.model.weights.safe_open"])
def test_no_memory_is_the_machines_fault_and_int8_no_remedy(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr(place, failing(error))
    with pytest.raises(MachineError, match=f"{tmp_path}.*: there is not enough memory for this model") as raised:
        load(tmp_path)
    assert "int8" not in str(raised.value)


def test_a_file_that_breaks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr("huarizo.model.weights.safe_open", failing(OSError("input/output error")))
    with pytest.raises(ModelError, match=r"model.safetensors: the weights can't be loaded: input/output error"):
        load(tmp_path)


def test_the_layers_are_those_of_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path)
    asked: list[int] = []
    quantise = storages.STORAGES["int8"].quantise

    def counted(linears: Any, peaks: torch.Tensor) -> Any:
        asked.append(len(linears))
        return quantise(linears, peaks)

    monkeypatch.setitem(storages.STORAGES, "int8", replace(storages.STORAGES["int8"], quantise=counted))
    assert sum(isinstance(module, Int8Linear) for module in load(tmp_path).modules()) == 15
    assert asked == [3, 1, 2, 1] * 2 + [1]  # q, k and v share their input; so do gate and up


def padded(lengths: tuple[int, ...] = (20, 18)) -> PaddedBatch:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(4, 260, (length,), generator=generator).tolist() for length in lengths]
    return pad([Example(row, row) for row in ids])


def gradients(base: Any, targets: list[str]) -> torch.Tensor:
    """Of a LoRA on a model of which nothing is known, over padded rows."""
    model = add_lora(base, make_recipe(lora={"dropout": 0, "target_modules": targets}).lora, seed=1)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    PaddedLoss(base_of(model))(model, padded((30, 26))).backward()
    trained = sorted((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return torch.cat([gradient.flatten() for _, gradient in trained])


OPT = (
    OPTForCausalLM,
    OPTConfig(
        **SIZES, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32, init_std=0.2, activation_function="gelu"
    ),
)
BLOOM = BloomForCausalLM, BloomConfig(**SIZES, n_head=4, initializer_range=0.2)


@pytest.mark.parametrize(("model", "config"), [OPT, BLOOM], ids=["opt", "bloom"])
def test_a_model_of_which_nothing_is_known_is_calibrated_on_padded_rows(
    model: Any, config: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model(config).save_pretrained(tmp_path)
    plain = load_base(tmp_path, torch.float32, CPU)
    base = load_quantised_base(tmp_path, "int8", torch.float32, CPU, padded())
    assert base.config._attn_implementation == plain.config._attn_implementation
    assert all(isinstance(linear, Int8Linear) for linear in linears_in(base).values())
    targets = linear_names(plain.base_model)
    ours, theirs = gradients(base, targets), gradients(plain, targets)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.998 and not torch.equal(ours, theirs)


def test_padding_has_no_say_in_the_peaks(tmp_path: Path) -> None:
    model, config = OPT
    odd: Any = model(config)
    with torch.no_grad():
        odd.get_input_embeddings().weight[0] = 100 * torch.eye(config.hidden_size)[0]  # of padding: one channel alone
    odd.save_pretrained(tmp_path)
    batch = padded((20, 5))
    assert not (batch.input_ids == 0)[batch.attention_mask.bool()].any()
    alone = load_quantised_base(
        tmp_path, "int8", torch.float32, CPU, pad([Example(batch.input_ids[1, :5].tolist(), [0] * 5)])
    )
    first = load_quantised_base(tmp_path, "int8", torch.float32, CPU, padded((20,)))
    both = [peaks_of(base) for base in (load_quantised_base(tmp_path, "int8", torch.float32, CPU, batch), alone, first)]
    of_first_layer = next(paths for paths in both[0] if any("layers.0.self_attn.q_proj" in path for path in paths))
    peaks, *apart = (found[of_first_layer] for found in both)
    torch.testing.assert_close(peaks, torch.maximum(*apart))


def test_linears_whose_weight_the_model_reads_itself_stay_in_floats(tmp_path: Path) -> None:
    GENERAL["mamba"].save(tmp_path, make_tokenizer())
    plain, base = (
        load_base(tmp_path, torch.float32, CPU),
        load_quantised_base(tmp_path, "int8", torch.float32, CPU, padded()),
    )
    floats = {path for path, linear in linears_in(base).items() if not isinstance(linear, Int8Linear)}
    assert floats == {"backbone.layers.0.mixer.dt_proj", "lm_head"}
    ids = padded().input_ids[:1]
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, plain(ids).logits, rtol=0.05, atol=0.01)
    again = load_quantised_base(tmp_path, "int8", torch.float32, CPU, peaks_of(base)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in base.state_dict().items())
