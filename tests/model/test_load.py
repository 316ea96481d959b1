"""What a model's configuration says of it, and what goes wrong while it loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from huarizo.data.packing import pack
from huarizo.data.tokens import Example
from huarizo.errors import MachineError, ModelError
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.load import activation_bytes_per_token, load_base, positions, weight_bytes
from huarizo.model.lora import count_weights
from huarizo.model.loss import PackedLoss
from tests.tiny import make_model

CPU = torch.device("cpu")
FROM_PRETRAINED = "transformers.LlamaForCausalLM.from_pretrained"


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 2048),
        ({"rope_type": "default"}, 2048),
        ({"type": "linear", "factor": 4.0}, 8192),
        ({"rope_type": "dynamic", "factor": 2}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 2.0}, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}, 2048),
        ({"rope_type": "linear", "factor": float("inf")}, 2048),
        ({"rope_type": "linear", "factor": "8"}, 2048),
        ("linear", 2048),
    ],
)
def test_the_longest_text_that_a_model_was_made_for(scaling: Any, expected: int) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        assert positions({"max_position_embeddings": 2048, name: scaling}) == expected
    assert positions({}) == 2048


TINYLLAMA = {
    "model_type": "llama",
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip


def test_the_weights_of_a_known_model() -> None:
    model = make_model()
    config = model.config.to_dict()
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    assert weight_bytes(config, "fp32", torch.float32) == 4 * (count_weights(model) - norms)
    assert weight_bytes(TINYLLAMA, "int8", torch.bfloat16) == 968_884_224 + (1 + 2) * 32000 * 2048
    tied = TINYLLAMA | {"tie_word_embeddings": True}
    assert weight_bytes(tied, "int8", torch.bfloat16) == weight_bytes(TINYLLAMA, "int8", torch.bfloat16)
    assert 3e6 < activation_bytes_per_token(TINYLLAMA, torch.bfloat16) < 6e6


def failing(error: Exception) -> Any:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("odd"), KeyError("x"), TypeError("y")])
def test_a_bug_while_a_float_base_is_built_keeps_its_own_name(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr(FROM_PRETRAINED, failing(error))
    with pytest.raises(type(error)) as raised:
        load_base(tmp_path, torch.float32, CPU)
    assert raised.value is error


@pytest.mark.parametrize("error", [OSError("input/output error"), SafetensorError("header too large")])
def test_a_file_that_breaks_is_reported(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr(FROM_PRETRAINED, failing(error))
    with pytest.raises(ModelError, match=f"{tmp_path}: the weights can't be loaded: {error}"):
        load_base(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("error", [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory")])
def test_no_memory_for_a_float_base_has_int8_as_a_remedy(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr(FROM_PRETRAINED, failing(error))
    with pytest.raises(MachineError, match=r"not enough memory for this model\..*, or train with precision=int8"):
        load_base(tmp_path, torch.float32, CPU)


def test_dropout_in_the_attention_of_a_base_has_no_say(tmp_path: Path) -> None:
    make_model(attention_dropout=0.5).save_pretrained(tmp_path)
    batch = pack([Example(list(range(4, 40)), list(range(4, 40)))])
    plain = load_base(tmp_path, torch.float32, CPU)
    quantised = load_quantised_base(tmp_path, "int8", torch.float32, CPU, batch)
    for base in (plain, quantised):
        loss = PackedLoss(base)
        with torch.no_grad():
            assert loss(base.train(), batch) == loss(base.eval(), batch)
