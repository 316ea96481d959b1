"""Training and resuming as a user calls them: the last word, one clear message, Ctrl-C and going on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.commands.make import ENVIRONMENT, call, huarizo


def test_the_last_word_is_the_run_folder(training: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    assert training.returncode == 0, training.stderr
    recipe_file = Path(training.args[-1])
    run = Path(training.stdout.split()[-1])
    assert run == recipe_file.parent / "run"
    assert {p.name for p in run.iterdir()} == {
        "recipe.yaml", "plan.json", "adapter", "checkpoints", "events.jsonl", "metrics.jsonl", "samples.jsonl", "loss.png",
    }  # fmt: skip
    assert not [p for p in run.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    again = call("train", str(recipe_file), cwd=tmp_path)
    assert again.returncode == 2 and "huarizo resume" in again.stderr
    complete = call("resume", str(run), cwd=tmp_path)
    assert complete.returncode == 2 and "complete" in complete.stderr


def test_a_run_has_its_losses_samples_and_resolved_recipe(run: Path) -> None:
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


@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("int8", True)])
def test_ctrl_c_saves_and_resume_ends_as_if_never_stopped(
    precision: str, compiled: bool, recipe_file: Path, tmp_path: Path
) -> None:
    more = ["training.epochs=30", "samples=0", "data.eval=0", f"precision={precision}", f"training.compile={compiled}"]
    whole = call("train", str(recipe_file), *more, f"output={tmp_path / 'whole'}", cwd=tmp_path)
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
    done = call("train", str(recipe_file), *change, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("huarizo: ")
    assert not (tmp_path / "run" / "adapter").exists()


def test_another_architecture_is_refused_in_words(recipe_file: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny-llama" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "t5"'))
    done = call("train", str(recipe_file), cwd=tmp_path)
    assert done.returncode == 2 and "it has an encoder and a decoder (model_type 't5'" in done.stderr


def test_show_data_prints_rows_as_the_model_sees_them(recipe_file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row | {"source": "web"} for row in json.loads(rows.read_text())]))
    done = call("train", str(recipe_file), "--show-data", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of them learnt") == 2 and "«1" in done.stdout and "<|im_end|>»" in done.stdout
    assert done.stdout.count("not used: source") == 1
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_skipped_on_request_and_written_down(recipe_file: Path, tmp_path: Path) -> None:
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows[3]["output"] = 7
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    refused = call("train", str(recipe_file), cwd=tmp_path)
    assert refused.returncode == 2 and "row 4" in refused.stderr and "output" in refused.stderr
    done = call("train", str(recipe_file), "data.on_bad_row=skip", "training.max_steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (skipped,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["row"] == 4


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
