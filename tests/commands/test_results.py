"""The commands for a trained result: their last line, what they refuse, and what is never sent unasked."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.make import ENVIRONMENT, Terminal, call
from tests.hub.server import HubServer, User


def test_a_comparison_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = ["compare", str(run), "--out", str(page), "--max-new-tokens", "5"]
    done = call(*command, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"compared: {page}", done.stderr
    again = call(*command, cwd=tmp_path)
    assert again.returncode == 2 and "--force" in again.stderr and "<table>" in page.read_text()


def test_an_evaluation_measures_what_training_measured(run: Path, tmp_path: Path) -> None:
    done = call("eval", str(run), "--answers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.split()[-1])
    summary = json.loads((folder / "summary.json").read_text())
    assert folder.parent == run / "evaluations" and summary["rows"] == 2
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    heldout = [row["eval_loss"] for row in before if "eval_loss" in row]
    loss = summary["loss"]
    assert [loss["before"]["value"], loss["after"]["value"]] == pytest.approx([heldout[0], heldout[-1]], abs=1e-4)


def test_an_evaluation_outlives_its_output(run: Path, tmp_path: Path) -> None:
    """What was measured is written, though it could not be shown."""
    command = [sys.executable, "-m", "huarizo", "eval", str(run), "--answers", "0", "--out"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "full"], cwd=tmp_path, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    *said, error = done.stderr.splitlines()
    assert done.returncode == 3 and said == ["precision: fp32, as in training"], done.stderr
    assert error.startswith("huarizo: ") and "No space left" in error
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*command, "closed"], cwd=tmp_path, env=ENVIRONMENT, stdout=written, stderr=subprocess.PIPE, text=True
    )
    os.close(written)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    for name in ("full", "closed"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["rows"] == 2


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("eval", ["--harness", ""], "--harness needs the names of tasks"),
        ("eval", ["lora.r=3"], "lora.r=3"),
        ("compare", ["a.txt", "b.txt"], "b.txt: only one file"),
        ("export", ["--type", "q4_k_m"], "llama-quantize"),
        ("export", ["--to", "onnx"], "gguf is the only format"),
    ],
)
def test_mistakes_end_with_code_2(run: Path, tmp_path: Path, command: str, words: list[str], message: str) -> None:
    done = call(command, str(run), *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_run_without_an_adapter_can_not_be_merged_or_exported(
    recipe_file: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe_file.read_text())
    done = call(command, str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 2 and "no adapter yet" in done.stderr and "huarizo resume" in done.stderr


def test_an_export_for_ollama_ends_with_what_to_type(run: Path, tmp_path: Path) -> None:
    done = call("export", str(run), "--type", "q8_0", "--ollama", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ollama create run-q8_0 -f" in done.stdout and "ollama run run-q8_0" in done.stdout
    assert done.stdout.splitlines()[-1] == f"exported: {run / 'run-q8_0.gguf'}"
    assert "<|im_start|>" in (run / "Modelfile").read_text() and (run / "run-q8_0.gguf").is_file()


def test_an_adapter_that_llama_cpp_can_not_load_is_kept_but_not_verified(run: Path, tmp_path: Path) -> None:
    done = call("export", str(run), "--adapter", "--verify", cwd=tmp_path)
    assert done.returncode == 2 and "llama.cpp can't load" in done.stderr, done.stderr  # bytes without a merge
    assert (run / "run-adapter.gguf").is_file() and not list(run.glob(".*/base.gguf"))


def test_a_push_shows_all_and_sends_nothing_without_a_person(run: Path, tmp_path: Path) -> None:
    done = call("push", str(run), "ann/adapter", cwd=tmp_path)
    assert done.returncode == 2 and "--yes" in done.stderr and "adapter_model.safetensors" in done.stdout
    assert "private" in done.stdout and str(tmp_path) not in done.stdout


@pytest.mark.parametrize("answer", ["n\n", "\n"])
def test_nothing_is_sent_without_a_yes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    def sent(*_: object) -> str:
        raise AssertionError("sent")

    monkeypatch.setattr("huarizo.hub.upload.account", lambda name: f"to {name} as ann")
    monkeypatch.setattr("huarizo.results.publish.publish", sent)
    done = call("push", str(run), "ann/adapter", cwd=tmp_path, stdin=Terminal(answer))
    assert done.returncode == 130 and "to ann/adapter as ann" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1].endswith("nothing was sent") and "pushed" not in done.stdout


def test_the_end_of_input_sends_nothing(run: Path, tmp_path: Path) -> None:
    """Ctrl-D on a terminal, in a process that knows a hub."""
    person, terminal = pty.openpty()
    os.write(person, b"\x04")
    with HubServer({}, {"hf_" + "a" * 34: User("ann", "write")}) as hub:
        env = ENVIRONMENT | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-m", "huarizo", "push", str(run), "ann/adapter"],
            cwd=tmp_path, env=env, stdin=terminal, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    os.close(person)
    os.close(terminal)
    assert {method for method, _, _ in hub.asked} == {"GET"}
    assert "to ann/adapter as ann, with the token in the environment variable HF_TOKEN" in done.stdout
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert "Send this?" in (done.stdout + done.stderr).splitlines()[-1] and "pushed" not in done.stdout
