"""The commands as a user calls them: exit codes, one clear message, the last word, Ctrl-C and going on."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from huarizo.commands import main as cli
from huarizo.console import confirm
from huarizo.runs import find_run
from tests.hub.server import HubServer, User

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def huarizo(*arguments: str, cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "huarizo", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model_folder: Path, alpaca_file: Path) -> Path:
    recipe = {
        "model": str(tiny_model_folder), "data": {"train": str(alpaca_file), "eval": 2}, "precision": "fp32", "samples": 1,
        "training": {"epochs": 2, "save_every": 2, "learning_rate": 1e-3, "compile": False},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_a_run_from_start_to_answer(recipe_file: Path, tmp_path: Path) -> None:
    done = huarizo("train", str(recipe_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.split()[-1])
    assert run == tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "recipe.yaml", "adapter", "checkpoints", "metrics.jsonl", "samples.jsonl", "loss.png",
    }  # fmt: skip
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "eta_s"} <= steps[0].keys()
    assert "eval_loss" in metrics[0] and "eval_loss" in metrics[-1]
    (sample,) = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sample["prompt"] and sample["before"] is not None and sample["after"] is not None
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["data"]["prompt"] == "chat" and resolved["lora"]["r"] == 8
    assert set(resolved["pinned"]) == {"model", "train"} and len(resolved["pinned"]["train"]["rows.json"]) == 64
    assert not [p for p in run.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]

    answer = huarizo("ask", str(run), "Count to 3", "--max-new-tokens", "5", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    talk = huarizo("chat", str(run), "--max-new-tokens", "3", cwd=tmp_path, input="hello\n/reset\n/exit\n")
    assert talk.returncode == 0 and "you>" in talk.stdout, talk.stderr
    use_the_result(run, tmp_path)
    nothing_is_sent_unasked(run, tmp_path)
    an_evaluation_outlives_its_output(run, tmp_path)
    again = huarizo("train", str(recipe_file), cwd=tmp_path)
    assert again.returncode == 2 and "huarizo resume" in again.stderr
    complete = huarizo("resume", str(run), cwd=tmp_path)
    assert complete.returncode == 2 and "complete" in complete.stderr


def use_the_result(run: Path, tmp_path: Path) -> None:
    """Every command for a finished run, its last line, and its refusal to overwrite."""
    asked = huarizo("ask", str(run / "adapter"), "--json", "--max-new-tokens", "3", cwd=tmp_path, input="Count to 2\n")
    assert json.loads(asked.stdout).keys() == {"prompt", "answer", "tokens", "finished"}, asked.stderr
    nothing = huarizo("ask", str(run), cwd=tmp_path, input="")
    assert nothing.returncode == 2 and "the prompt is empty" in nothing.stderr
    command = [sys.executable, "-m", "huarizo", "ask", str(run), "--max-new-tokens", "2"]
    broken = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, input=b"Hi \xff", capture_output=True)
    assert broken.returncode == 2 and b"not text in UTF-8" in broken.stderr and b"Traceback" not in broken.stderr
    ascii = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    told = subprocess.run([*command, "--json", "이름?"], cwd=tmp_path, env=ascii, capture_output=True)
    assert json.loads(told.stdout)["prompt"] == "이름?", told.stderr
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True
    )
    assert closed.returncode == 2 and b"the prompt is empty" in closed.stderr
    page = tmp_path / "page.html"
    for _ in range(2):
        compared = huarizo("compare", str(run), "--out", str(page), "--max-new-tokens", "5", cwd=tmp_path)
    assert compared.returncode == 2 and "--force" in compared.stderr and "<table>" in page.read_text()
    evaluated = huarizo("eval", str(run), "--answers", "1", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    folder = Path(evaluated.stdout.split()[-1])
    assert folder.parent == run / "evaluations" and json.loads((folder / "summary.json").read_text())["rows"] == 2
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = json.loads((folder / "summary.json").read_text())["loss"]
    heldout = [row["eval_loss"] for row in before if "eval_loss" in row]
    assert [loss["before"]["value"], loss["after"]["value"]] == pytest.approx([heldout[0], heldout[-1]], abs=1e-4)
    exported = huarizo("export", str(run), "--type", "q8_0", "--ollama", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert "ollama create run-q8_0 -f" in exported.stdout and "ollama run run-q8_0" in exported.stdout
    assert "<|im_start|>" in (run / "Modelfile").read_text() and (run / "run-q8_0.gguf").is_file()
    alone = huarizo("export", str(run), "--adapter", "--verify", cwd=tmp_path)
    assert alone.returncode == 2 and "llama.cpp can't load" in alone.stderr, alone.stderr  # bytes without a merge
    assert (run / "run-adapter.gguf").is_file() and not list(run.glob(".*/base.gguf"))
    quantised = huarizo("export", str(run), "--type", "q4_k_m", cwd=tmp_path)
    assert quantised.returncode == 2 and "llama-quantize" in quantised.stderr
    pushed = huarizo("push", str(run), "ann/adapter", cwd=tmp_path, input="")
    assert pushed.returncode == 2 and "--yes" in pushed.stderr and "adapter_model.safetensors" in pushed.stdout
    assert "private" in pushed.stdout and str(tmp_path) not in pushed.stdout


def nothing_is_sent_unasked(run: Path, tmp_path: Path) -> None:
    """Whatever a person at a terminal says but yes."""
    for said, message in ((b"n\n", "nothing was sent"), (b"\n", "nothing was sent"), (b"\x04", "Send this?")):
        person, terminal = pty.openpty()
        command = [sys.executable, "-m", "huarizo", "push", str(run), "ann/adapter"]
        os.write(person, said)
        with HubServer({}, {"hf_" + "a" * 34: User("ann", "write")}) as hub:
            env = ENVIRONMENT | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_OFFLINE": "0"}
            env |= {"HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
            done = subprocess.run(
                command, cwd=tmp_path, env=env, stdin=terminal, capture_output=True, text=True, timeout=120
            )
        assert {method for method, _, _ in hub.asked} == {"GET"}
        assert "to ann/adapter as ann, by the token in the environment variable HF_TOKEN" in done.stdout
        os.close(person)
        os.close(terminal)
        assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
        assert message in (done.stdout + done.stderr).splitlines()[-1] and "pushed" not in done.stdout


def an_evaluation_outlives_its_output(run: Path, tmp_path: Path) -> None:
    """What was measured is there, though it could not be shown."""
    command = [sys.executable, "-m", "huarizo", "eval", str(run), "--answers", "0", "--out"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "full"], cwd=tmp_path, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("huarizo: ") and "No space left" in done.stderr
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*command, "closed"], cwd=tmp_path, env=ENVIRONMENT, stdout=written, stderr=subprocess.PIPE, text=True
    )
    os.close(written)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    for name in ("full", "closed"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["rows"] == 2
    refused = huarizo("eval", str(run), "--harness", "", cwd=tmp_path)
    assert refused.returncode == 2 and "--harness needs the names of tasks" in refused.stderr
    other = huarizo("eval", str(run), "lora.r=3", cwd=tmp_path)
    assert other.returncode == 2 and "lora.r=3" in other.stderr
    two = huarizo("compare", str(run), "a.txt", "b.txt", cwd=tmp_path)
    assert two.returncode == 2 and "b.txt: one file" in two.stderr


def test_ctrl_c_and_the_end_of_input_answer_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def abort(*_: Any, **__: Any) -> bool:
        raise typer.Abort

    monkeypatch.setattr(typer, "confirm", abort)
    with pytest.raises(KeyboardInterrupt):
        confirm("Send this?", default=False)


@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("int8", True)])
def test_ctrl_c_saves_and_resume_ends_as_if_never_stopped(
    precision: str, compiled: bool, recipe_file: Path, tmp_path: Path
) -> None:
    more = ["training.epochs=30", "samples=0", "data.eval=0", f"precision={precision}", f"training.compile={compiled}"]
    whole = huarizo("train", str(recipe_file), *more, f"output={tmp_path / 'whole'}", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "huarizo", "train", str(recipe_file), *more]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while (
        process.poll() is None
        and time.monotonic() < until
        and not (metrics.is_file() and metrics.read_text().count("\n") > 4)
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert f"huarizo resume {tmp_path / 'run'}" in stderr
    resumed = huarizo("resume", str(tmp_path / "run"), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr

    def lines(name: str) -> list[tuple[int, float]]:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    assert lines("run") == lines("whole") and len(lines("run")) == 90
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["lora.rr=3"], "Did you mean 'lora.r'?"),
        (["model=/no/such/folder"], "/no/such/folder"),
        (["data.train=missing.json"], "missing.json"),
        (["precision=fp16"], "needs an NVIDIA GPU"),
        (["lora.target_modules=q_prj"], "Did you mean 'q_proj'?"),
        (["data.max_length=8"], "data.max_length=8"),
        (["data.eval=100"], "holds out 100 of 12 rows"),
    ],
)
def test_mistakes_end_with_code_2_and_no_traceback(
    recipe_file: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    done = huarizo("train", str(recipe_file), *change, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("huarizo: ")
    assert not (tmp_path / "run" / "adapter").exists()


def test_another_architecture_is_refused_in_words(recipe_file: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    config = tiny_model_folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "gpt2"'))
    done = huarizo("train", str(recipe_file), cwd=tmp_path)
    assert done.returncode == 2 and "architecture is 'gpt2'" in done.stderr


def test_show_data_prints_rows_as_the_model_sees_them(recipe_file: Path, tmp_path: Path, alpaca_file: Path) -> None:
    alpaca_file.write_text(json.dumps([row | {"source": "web"} for row in json.loads(alpaca_file.read_text())]))
    done = huarizo("train", str(recipe_file), "--show-data", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of them learnt") == 2 and "«1" in done.stdout and "<|im_end|>»" in done.stdout
    assert done.stdout.count("not used: source") == 1
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_skipped_on_request_and_written_down(recipe_file: Path, tmp_path: Path, alpaca_file: Path) -> None:
    rows = json.loads(alpaca_file.read_text())
    rows[3]["output"] = 7
    alpaca_file.write_text(json.dumps(rows))
    refused = huarizo("train", str(recipe_file), cwd=tmp_path)
    assert refused.returncode == 2 and "row 4" in refused.stderr and "output" in refused.stderr
    done = huarizo("train", str(recipe_file), "data.on_bad_row=skip", "training.max_steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (skipped,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["row"] == 4


def test_the_doctor_tells_what_the_machine_can_do(tmp_path: Path) -> None:
    done = huarizo("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "device",
        "threads",
        "GB free",
        "torch 2.",
        "compiler",
        "precision      auto takes ",
        "tokens/s of TinyLlama",
    ):
        assert word in done.stdout


def test_the_recipe_command_prints_every_setting(tmp_path: Path) -> None:
    done = huarizo("recipe", cwd=tmp_path)
    assert done.returncode == 0
    assert all(key in done.stdout for key in ("data.max_length", "lora.target_modules", "trainer", "default 512"))


def test_the_docs_list_the_settings_as_they_are(tmp_path: Path) -> None:
    done = huarizo("recipe", "--markdown", cwd=tmp_path)
    assert done.stdout == (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()


def test_a_run_without_an_adapter_can_not_be_merged_or_exported(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe_file.read_text())
    for command in ("merge", "export"):
        done = huarizo(command, str(tmp_path / "run"), cwd=tmp_path)
        assert done.returncode == 2 and "no adapter yet" in done.stderr and "huarizo resume" in done.stderr
    done = huarizo("export", str(tmp_path / "run"), "--to", "onnx", cwd=tmp_path)
    assert done.returncode == 2 and "gguf is the only format" in done.stderr


@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 3), (">&-", 0), ("| true", 0)])
def test_a_short_output_that_nobody_takes(tmp_path: Path, redirection: str, code: int) -> None:
    command = f"'{sys.executable}' -m huarizo recipe {redirection}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == code and len(done.stderr.splitlines()) == (code == 3), done.stderr


def test_training_that_nobody_reads_ends_with_a_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe_file.write_text(yaml.safe_dump(recipe | {"training": recipe["training"] | {"epochs": 300}}))
    command = f"('{sys.executable}' -m huarizo train '{recipe_file}'; echo $? > code) | head -1"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (tmp_path / "code").read_text().strip() == "130" and len(done.stdout.splitlines()) == 1
    assert "stopped because standard output was closed after step" in done.stderr and "huarizo resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert any((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))


def test_the_first_line_comes_before_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from huarizo.commands import main, train\n"
        "train.load_recipe = train.open_run = lambda *_: sys.exit('torch' in sys.modules)\n"
        "sys.argv = ['huarizo', *sys.argv[1:]]; main.main()"
    )
    for command in (["train", "any.yaml"], ["resume", "any"]):
        started = [sys.executable, "-c", code, *command]
        done = subprocess.run(started, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("huarizo ") and "loading PyTorch" in done.stdout


def test_a_name_that_no_file_can_have_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "keep_terminal_plain", lambda: None)
    monkeypatch.setattr(cli, "app", lambda: find_run("x" * 300))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "too long for a file" in capsys.readouterr().err
