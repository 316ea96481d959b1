"""What a model's configuration says of it."""

from typing import Any

import pytest
import torch

from huarizo.model.load import activation_bytes_per_token, positions, weight_bytes
from huarizo.model.lora import count_weights
from tests.tiny import make_model


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
