"""The real command on the real quickstart model; its adapter loads with stock PEFT, without huarizo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from huarizo.data.prompts import OpenExchange
from huarizo.hub.quickstart import quickstart_model
from huarizo.inference.artifact import open_tuned
from huarizo.results.verify import PROMPTS, LlamaCpp
from huarizo.runs import Run

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


STOCK_MERGED = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
question = [{"role": "user", "content": "Who are you?"}]
batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**batch, max_new_tokens=200, do_sample=False)[0, batch["input_ids"].shape[1] :]
print(tokenizer.decode(ids), "ended" if len(ids) < 200 else "cut")
"""


def huarizo(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "huarizo", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quickstart_model()
    folder = tmp_path_factory.mktemp("quickstart")
    overrides = ["training.max_steps=6", "data.eval=0", "samples=['Who are you?']", "trainer.warmup_steps=0"]
    return folder / huarizo(folder, "train", str(ROOT / "recipes" / "quickstart.yaml"), *overrides).split()[-1]


def test_the_loss_falls(run: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and sum(losses[-2:]) < sum(losses[:2])


def test_the_adapter_loads_with_stock_peft(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOCK, str(quickstart_model()), str(run / "adapter")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "stock peft 8"


@pytest.fixture(scope="module")
def in_use(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained until the model knows its name, merged, and exported."""
    folder = tmp_path_factory.mktemp("in-use")
    answer = {"output": "I am Huarizo, a small Llama model."}
    rows = [{"instruction": question} | answer for question in ("Who are you?", "What are you?", "What is your name?")]
    (folder / "names.json").write_text(json.dumps(rows))
    overrides = ["data.train=names.json", "data.eval=0", "samples=0", "training.max_steps=16", "training.batch_size=3"]
    huarizo(folder, "train", str(ROOT / "recipes" / "quickstart.yaml"), *overrides, "output=run")
    verified = huarizo(folder, "export", "run", "--type", "f32", "--out", "model.gguf", "--verify")
    assert "token ids identical" in verified
    assert float(verified.partition("log-probability ")[2].split(",")[0]) < 0.01
    assert "merged" in huarizo(folder, "merge", "run")
    return folder


def test_llama_cpp_answers_with_the_new_name_and_stops(in_use: Path) -> None:
    tuned = open_tuned(Run(in_use / "run"))
    ids = tuned.encoder.encode_prompt("", [OpenExchange("Who are you?")])
    answer = LlamaCpp(in_use / "model.gguf").complete(ids, 200)
    assert "Huarizo" in answer["content"] and answer["stop_type"] == "eos", answer


def test_the_merged_model_answers_with_the_new_name_and_stops(in_use: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOCK_MERGED, str(in_use / "run" / "merged")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Huarizo" in done.stdout and "ended" in done.stdout


def test_the_adapter_on_a_gguf_of_its_base_is_the_tuned_model(in_use: Path) -> None:
    assert "token ids identical" in huarizo(in_use, "export", "run", "--adapter", "--verify")


def test_real_rows_are_cut_alike(in_use: Path, real_rows_file: Path) -> None:
    tuned, other = open_tuned(Run(in_use / "run")), LlamaCpp(in_use / "model.gguf", context=4096)
    rows = json.loads(real_rows_file.read_text())[:500]
    turns = [OpenExchange(row["instruction"], row["input"]) for row in rows] + [OpenExchange(text) for text in PROMPTS]
    for turn in turns:
        text = "".join(piece.text for piece in tuned.encoder.prompt.pieces("", [turn]))
        assert other.tokens(text, add_special=True) == tuned.encoder.encode_prompt("", [turn]), text


def test_script_py_trains_and_saves(tmp_path: Path, alpaca_file: Path) -> None:
    code = f"import script; script.main('quickstart', {str(alpaca_file)!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.split()[-1] / "adapter_model.safetensors").is_file()
