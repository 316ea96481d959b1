"""What a model's configuration says of it."""

from typing import Any

import pytest

from huarizo.model.load import positions


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
