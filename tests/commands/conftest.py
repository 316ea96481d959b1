"""A recipe for a tiny model, and one run trained from it that all tests of the commands share."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.commands.make import huarizo
from tests.tiny import make_model, make_tokenizer


def write_recipe(folder: Path) -> Path:
    """Twelve rows, a tiny model, and the recipe of two epochs on them in fp32."""
    make_model().save_pretrained(folder / "tiny-llama")
    make_tokenizer().save_pretrained(folder / "tiny-llama")
    rows = [
        {"instruction": f"Count to {n}", "input": "", "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(1, 13)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "model": str(folder / "tiny-llama"), "data": {"train": str(folder / "rows.json"), "eval": 2},
        "precision": "fp32", "samples": 1, "output": str(folder / "run"),
        "training": {"epochs": 2, "save_every": 2, "learning_rate": 1e-3, "compile": False},
    }  # fmt: skip
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe beside its model (tiny-llama) and its rows (rows.json)."""
    return write_recipe(tmp_path)


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The process that trained the shared run; `args[-1]` is its recipe. What it made is only read."""
    file = write_recipe(tmp_path_factory.mktemp("trained"))
    return huarizo("train", str(file), cwd=file.parent)


@pytest.fixture
def run(training: subprocess.CompletedProcess[str], tmp_path: Path) -> Path:
    """A copy of the shared run, in which commands may write."""
    assert training.returncode == 0, training.stderr
    return shutil.copytree(Path(training.args[-1]).parent / "run", tmp_path / "run")
