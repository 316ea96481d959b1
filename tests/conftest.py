"""Fixtures for all tests: small Llamas and their tokenizers, TinyLlama's tokenizer and real rows where they are there."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.on_tier import each_tier  # noqa: F401

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tinyllama_folder() -> Path:
    """The folder with TinyLlama's own tokenizer and config (no weights)."""
    folder = SHARED / "tinyllama"
    if not folder.is_dir():
        pytest.skip("TinyLlama's tokenizer is not beside the repository (shared/data/tinyllama)")
    return folder


@pytest.fixture(scope="session")
def tinyllama_tokenizer(tinyllama_folder: Path) -> Any:
    from huarizo.model.load import load_tokenizer

    return load_tokenizer(tinyllama_folder)


@pytest.fixture(scope="session")
def real_rows_file() -> Path:
    """999 real Alpaca rows."""
    file = SHARED / "alpaca_en_demo.json"
    if not file.is_file():
        pytest.skip("the real Alpaca rows are not beside the repository (shared/data/alpaca_en_demo.json)")
    return file


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer of 260 tokens with a chat template in ChatML; pad is EOS."""
    from tests.tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def tiny_model_folder(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A model folder with random weights: Llama with grouped queries, vocabulary of the tiny tokenizer."""
    from tests.tiny import make_model

    folder = tmp_path / "tiny-llama"
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def alpaca_file(tmp_path: Path) -> Path:
    """Twelve short Alpaca rows."""
    rows = [
        {"instruction": f"Count to {n}", "input": "", "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(1, 13)
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    return file
