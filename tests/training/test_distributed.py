"""Two processes under torchrun (gloo) train what one process trains, from the first step on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def test_two_processes_have_the_losses_of_one(tmp_path: Path, tiny_model_folder: Path, alpaca_file: Path) -> None:
    recipe = {
        "model": str(tiny_model_folder), "data": {"train": str(alpaca_file), "eval": 3}, "precision": "fp32", "samples": 1,
        "lora": {"dropout": 0}, "training": {"batch_size": 4, "epochs": 3, "learning_rate": 1e-2, "eval_every": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    results = []
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, "-m", "huarizo", "train", "recipe.yaml", f"output={name}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == name and done.stdout.count("done:") == 1
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [(row["step"], row.get("loss"), row.get("eval_loss"), row.get("tokens")) for row in rows]
        results.append((losses, load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")))
    (one, weights_one), (two, weights_two) = results
    assert [(step, tokens) for step, _, _, tokens in one] == [(step, tokens) for step, _, _, tokens in two]
    assert [row[1] for row in two if row[1]] == pytest.approx([row[1] for row in one if row[1]], rel=1e-5)
    assert [row[2] for row in two if row[2]] == pytest.approx([row[2] for row in one if row[2]], rel=1e-5)
    assert max(float((weights_two[name] - tensor).abs().max()) for name, tensor in weights_one.items()) < 1e-4


def test_two_processes_stop_together_and_go_on_bit_identically(
    tmp_path: Path, tiny_model_folder: Path, alpaca_file: Path
) -> None:
    recipe = {
        "model": str(tiny_model_folder), "data": {"train": str(alpaca_file), "eval": 3}, "precision": "fp32", "samples": 1,
        "lora": {"dropout": 0.3}, "training": {"batch_size": 3, "epochs": 2, "compile": False},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def both(*arguments: str) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *launcher, "-m", "huarizo", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    assert both("train", "recipe.yaml", "output=whole").returncode == 0
    stopped = both("train", "recipe.yaml", "output=stopped", "training.max_minutes=0.00001")
    assert stopped.returncode != 0 and "after step 1 of 6, which is saved" in stopped.stderr, stopped.stderr
    file = tmp_path / "stopped" / "recipe.yaml"
    file.write_text(file.read_text().replace("max_minutes: 1.0e-05", "max_minutes: null"))
    resumed = both("resume", "stopped")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step 1" in resumed.stdout and "changed since" not in resumed.stdout
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "stopped")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
