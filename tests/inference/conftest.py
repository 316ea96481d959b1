"""An assistant that several tests share."""

import pytest

from huarizo.inference.generate import Assistant, open_assistant
from tests.results.make import make_tuned


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return open_assistant(make_tuned(tmp_path_factory.mktemp("tuned"), max_position_embeddings=256), "fp32")
