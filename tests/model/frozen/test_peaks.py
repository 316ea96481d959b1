"""A base that is quantised with kept peaks has the weights that it was trained with, to the bit, and never runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo.errors import ModelError
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.frozen.peaks import peaks_of, read_peaks, write_peaks
from huarizo.model.lora import add_lora
from huarizo.recipe import make_recipe
from tests.model.frozen.test_int8 import calibration
from tests.tiny import make_model

CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path: Path) -> Any:
    make_model(num_hidden_layers=11, attention_bias=True).save_pretrained(tmp_path / "base")
    return load_quantised_base(tmp_path / "base", "int8", torch.bfloat16, CPU, calibration())


def test_kept_peaks_give_the_same_weights_without_running(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, expected = tmp_path / "peaks.safetensors", base.state_dict()
    tuned = add_lora(base, make_recipe(lora={"target_modules": "all-linear"}).lora, seed=1)
    write_peaks(file, peaks_of(tuned.get_base_model()))
    monkeypatch.setattr(type(base), "forward", lambda *_, **__: pytest.fail("the model runs"))
    monkeypatch.setattr(type(base.model), "forward", lambda *_, **__: pytest.fail("the model runs"))
    again = load_quantised_base(tmp_path / "base", "int8", torch.bfloat16, CPU, read_peaks(file))
    found = again.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    attention: Any = again.model.layers[10].self_attn
    assert attention.q_proj.input_scale is attention.v_proj.input_scale, "layers that share an input share its scale"
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_peaks_of_another_model_are_refused(base: Any, tmp_path: Path) -> None:
    for number, config in enumerate(({"num_hidden_layers": 2}, {"num_hidden_layers": 11, "intermediate_size": 80})):
        other = tmp_path / str(number)
        make_model(**config).save_pretrained(other)
        with pytest.raises(ModelError, match=r"calibration is not for this model: .*mlp|layers\.2.*--precision float"):
            load_quantised_base(other, "int8", torch.float32, CPU, peaks_of(base))


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "calibration.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"calibration.safetensors: can't be read: .*--precision float"):
        read_peaks(tmp_path / "calibration.safetensors")
