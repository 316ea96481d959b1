"""What goes wrong while a base is quantised is told as what it is: a file, the memory, or a bug."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo.errors import MachineError, ModelError
from huarizo.model.frozen import storages
from huarizo.model.frozen.int8 import Int8Linear
from huarizo.model.frozen.load import load_quantised_base
from tests.model.frozen.test_int8 import calibration
from tests.tiny import make_model

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
