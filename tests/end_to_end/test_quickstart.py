"""The real command on the real quickstart model; its adapter loads with stock PEFT, without huarizo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from huarizo.hub.quickstart import quickstart_model

ROOT = Path(__file__).parents[2]
STOCK = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
model = PeftModel.from_pretrained(base, sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
text = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
with_adapter = model(**ids).logits
with model.disable_adapter():
    without = model(**ids).logits
assert (with_adapter - without).abs().max() > 0.01
assert not [name for name in sys.modules if name.startswith("huarizo")]
print("stock peft", model.peft_config["default"].r)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quickstart_model()
    folder = tmp_path_factory.mktemp("quickstart")
    overrides = ["training.max_steps=6", "data.eval=0", "samples=['Who are you?']", "trainer.warmup_steps=0"]
    command = [sys.executable, "-m", "huarizo", "train", str(ROOT / "recipes" / "quickstart.yaml"), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / done.stdout.split()[-1]


def test_the_loss_falls(run: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and sum(losses[-2:]) < sum(losses[:2])


def test_the_adapter_loads_with_stock_peft(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOCK, str(quickstart_model()), str(run / "adapter")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "stock peft 8"


def test_from_the_run_to_a_model_in_llama_cpp(tmp_path: Path) -> None:
    """Trained until it knows its name, merged, exported, verified; llama.cpp answers with that name, and stops."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def huarizo(*arguments: str) -> str:
        command = [sys.executable, "-m", "huarizo", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    overrides = ["data.eval=0", "samples=0", "output=run"]
    huarizo("train", str(ROOT / "recipes" / "quickstart.yaml"), *overrides)
    verified = huarizo("export", "run", "--type", "f32", "--out", "model.gguf", "--verify")
    assert "token ids identical" in verified
    assert float(verified.partition("log-probability ")[2].split(",")[0]) < 0.01
    assert "token ids identical" in huarizo("export", "run", "--adapter", "--verify")
    assert "merged" in huarizo("merge", "run")
    from huarizo.data.prompts import OpenExchange
    from huarizo.results.tuned import open_tuned
    from huarizo.results.verify import LlamaCpp
    from huarizo.runs import Run

    tuned = open_tuned(Run(tmp_path / "run"))
    ids = tuned.encoder.encode_prompt("", [OpenExchange("Who are you?")])
    answer = LlamaCpp(tmp_path / "model.gguf").complete(ids, 200)
    assert "Huarizo" in answer["content"] and answer["stop_type"] == "eos", answer


def test_script_py_trains_and_saves(tmp_path: Path, alpaca_file: Path) -> None:
    code = f"import script; script.main('quickstart', {str(alpaca_file)!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.split()[-1] / "adapter_model.safetensors").is_file()
