"""A run from a recipe to the adapter, and what it leaves."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AttentionInterface

import huarizo.training.session
from benchmarks.small_models import save_small, small_config
from huarizo.errors import Interrupted, MachineError, RecipeError
from huarizo.events import Done, Event, Noted, OutOfMemory, Saved, Started, Step, Stopped, Warned
from huarizo.inference.artifact import find_tuned
from huarizo.inference.generate import open_assistant
from huarizo.model.attention import NAME as PACKED
from huarizo.model.attention import packed_attention
from huarizo.model.frozen.lora import FrozenLoraLinear
from huarizo.plan import Plan
from huarizo.recipe import Recipe, make_recipe
from huarizo.results.compare import compare
from huarizo.runs import Run
from huarizo.training.finetune import fine_tune, resume
from huarizo.training.lock import LockLostError
from huarizo.training.prepare import Prepared
from huarizo.training.session import Result
from tests.general import GENERAL
from tests.training.conftest import Killed
from tests.training.make import edit_recipe, printed
from tests.training.test_lock import OTHER


def test_everything_that_is_shown_is_kept_as_an_event(recipe: Recipe, tmp_path: Path) -> None:
    terminal, heard = io.StringIO(), list[Event]()
    fine_tune(recipe, console=Console(file=terminal, width=500), listeners=[heard.append])
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == [event.kind for event in heard]
    kinds = [type(event) for event in heard]
    assert kinds.index(Started) < kinds.index(Step) < kinds.index(Saved) < kinds.index(Done) == len(kinds) - 1
    titles = [event.title for event in heard if isinstance(event, Noted)]
    assert {"device", "model", "data", "precision", "memory", "LoRA", "layers", "saving"} <= set(titles)
    kept = " ".join(str(value) for row in rows for value in row.values())
    for line in terminal.getvalue().splitlines():
        if not line.startswith(("step ", "saved step ", "compiled ")):  # made of numbers
            assert line[10:].strip() in kept or line in kept, line


def test_a_run_keeps_its_plan_and_a_recipe_that_is_the_users(recipe: Recipe, tmp_path: Path) -> None:
    result = fine_tune(recipe.model_copy(update={"precision": "auto"}), console=Console(quiet=True))
    plan = Plan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert plan.choice.precision != "auto" and plan.micro_batch_tokens > 0 and not plan.compiled
    assert plan.compilation == "as the recipe asks" and plan.memory.adapter > 0
    kept = result.run.recipe()
    assert (kept.precision, kept.training.micro_batch_tokens, kept.trainer) == ("auto", None, {})


def test_a_run_that_stops_early_says_so_as_an_event(recipe: Recipe, tmp_path: Path) -> None:
    recipe.training.max_minutes = 1e-6
    with pytest.raises(Interrupted) as error:
        fine_tune(recipe, console=Console(quiet=True))
    heard = list[Event]()
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == Stopped.kind and last["reason"] == str(error.value)
    run = tmp_path / "run"
    text = (run / "recipe.yaml").read_text().replace("max_minutes: 1.0e-06", "max_minutes: null")
    (run / "recipe.yaml").write_text(text)
    resume(Run(run), console=Console(quiet=True), listeners=[heard.append])
    started = next(event for event in heard if isinstance(event, Started))
    assert started.step == 1 and isinstance(heard[-1], Done)
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows].count(Started.kind) == 2, "a resumed run appends to the same file"


def test_a_held_out_prompt_without_room_for_an_answer_is_no_sample(tiny_model_folder: Path, tmp_path: Path) -> None:
    files = {"train": ["Hi", "Hello"], "eval": ["x" * 3000, "Who are you?"]}  # bytes are tokens; 2048 positions
    for name, instructions in files.items():
        rows = [{"instruction": text, "input": "", "output": "Huarizo."} for text in instructions]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    recipe = make_recipe(
        model=str(tiny_model_folder), data={name: str(tmp_path / f"{name}.json") for name in files}, precision="fp32",
        samples=2, training={"compile": False}, output=str(tmp_path / "run"),
    )  # fmt: skip
    result = fine_tune(recipe, "run", Console(file=io.StringIO()))
    assert [sample.instruction for sample in result.samples] == ["Who are you?"]


def test_data_that_changes_during_the_run_is_reported(
    recipe: Recipe, console: Console, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = huarizo.training.session.load_model

    def changing(prepared: Any) -> Any:
        alpaca_file.write_text("[]")
        return load(prepared)

    monkeypatch.setattr(huarizo.training.session, "load_model", changing)
    fine_tune(recipe, console=console)
    assert f"{alpaca_file} changed during the run" in printed(console)


def test_no_space_is_said_before_the_start(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huarizo.training.session, "space_needed", lambda trainable, keep: 10**18)
    with pytest.raises(MachineError, match="are needed for checkpoints and adapter"):
        fine_tune(recipe)


def test_a_run_that_was_taken_over_stops_and_writes_no_more(
    recipe: Recipe, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe.output is not None
    run = Run(Path(recipe.output))

    def taken_over(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            (run.path / ".lock").write_text(json.dumps(OTHER))

    with pytest.raises(LockLostError, match="writes nothing more"):
        fine_tune(recipe, console=console, listeners=[taken_over])
    last = json.loads((run.path / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == Step.kind, "not even how the run ended for this process"
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step-000002"]
    assert "Training continues" not in printed(console) and not run.adapter.exists()
    assert json.loads((run.path / ".lock").read_text()) == OTHER


@pytest.mark.parametrize("planned_now", [None, 2048])
def test_micro_batches_that_memory_made_smaller_stay_so(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, planned_now: int | None
) -> None:
    assert recipe.output is not None
    run, sizes, room = Run(Path(recipe.output)), list[int](), [100]
    recipe.training.micro_batch_tokens, recipe.training.max_minutes = 1024, 1e-6
    load = huarizo.training.session.load_model

    def allocate(module: torch.nn.Module, args: Any, inputs: dict[str, torch.Tensor]) -> None:
        if module.training:
            sizes.append(inputs["input_ids"].shape[1])
            if sizes[-1] > room[0]:
                raise MemoryError

    def load_with_little_memory(prepared: Prepared) -> Any:
        model = load(prepared)
        model.get_base_model().register_forward_pre_hook(allocate, with_kwargs=True)
        return model

    monkeypatch.setattr(huarizo.training.session, "load_model", load_with_little_memory)
    heard = list[Event]()
    with pytest.raises(Interrupted):
        fine_tune(recipe, console=Console(quiet=True), listeners=[heard.append])
    assert sizes[0] > 100 >= max(sizes[1:]), "one attempt of the whole step, and then its parts"
    (event,) = [event for event in heard if isinstance(event, OutOfMemory)]
    assert event.step == 1 and event.micro_batch_tokens < 100
    edit_recipe(run, "training.max_minutes", None)
    if planned_now:
        edit_recipe(run, "training.micro_batch_tokens", planned_now)
    sizes.clear()
    room[0] = 10**9
    resume(run, Console(quiet=True))
    assert (max(sizes) > 100) == bool(planned_now)


def test_a_run_without_a_plan_is_resumed_as_its_recipe_says(recipe: Recipe, tmp_path: Path) -> None:
    """A run of an older version: its recipe holds what the machine chose, and its checkpoints do not say all of it."""
    recipe.training.micro_batch_tokens = 128
    fine_tune(recipe, console=Console(quiet=True))
    expected = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    recipe.output, recipe.training.max_minutes = str(tmp_path / "older"), 1e-6
    with pytest.raises(Interrupted):
        fine_tune(recipe, console=Console(quiet=True))
    run = Run(Path(recipe.output))
    run.plan_file.unlink()
    run.events.unlink()
    (checkpoint,) = run.checkpoints.iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"], manifest["micro_batch_tokens"], manifest["activation_checkpointing"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    edit_recipe(run, "training.max_minutes", None)
    heard = list[Event]()
    resume(run, Console(quiet=True), listeners=[heard.append])
    assert not [event for event in heard if isinstance(event, Warned)]
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == expected
    assert Plan.from_json(run.plan_file.read_text()).micro_batch_tokens == 128


@pytest.fixture
def scaled_attention() -> Iterator[Callable[[], None]]:
    """Packed attention has a wrong scale until this is called."""

    def right_again() -> None:
        AttentionInterface.register(PACKED, packed_attention)

    AttentionInterface.register(PACKED, lambda *args, scaling, **kwargs: packed_attention(*args, scaling=3.0, **kwargs))
    yield right_again
    right_again()


def losses_in(result: Result) -> list[Any]:
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in result.metrics]


def weights_in(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_where_packing_is_wrong_rows_are_padded_and_the_losses_are_right(
    recipe: Recipe, console: Console, scaled_attention: Callable[[], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huarizo.training.prepare.why_not", lambda on: None)
    recipe.training.compile = True
    heard = list[Event]()
    found = fine_tune(recipe, console=console, listeners=[heard.append])
    (warning,) = [event.text for event in heard if isinstance(event, Warned)]
    assert warning.startswith("packed rows have a loss of") and warning.endswith("so that training is slower but right")
    notes = {event.title: event.text for event in heard if isinstance(event, Noted)}
    assert notes["batches"].startswith("padded by at most 20%, with the model's own attention: ")
    assert notes["layers"] == "not compiled: batches are not packed"
    assert Plan.from_json((tmp_path / "run" / "plan.json").read_text()).batching == "padded"
    scaled_attention()
    recipe.output, recipe.training.compile = str(tmp_path / "right"), False
    expected = fine_tune(recipe, console=console)
    for (step, loss), (same, right) in zip(losses_in(found), losses_in(expected), strict=True):
        assert step == same and loss == pytest.approx(right, rel=1e-5)


def train_until_killed(recipe: Recipe) -> None:
    """Train, and end in step 5 as a killed process does."""

    def killer(event: Event) -> None:
        if isinstance(event, Step) and event.step == 5:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(recipe, console=Console(quiet=True), listeners=[killer])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_keeps_its_batching_and_resumes_to_the_bit(
    recipe: Recipe, scaled_attention: Callable[[], None], elsewhere: bool, tmp_path: Path
) -> None:
    fine_tune(recipe, console=Console(quiet=True))
    expected, recipe.output = weights_in(tmp_path / "run"), str(tmp_path / "stopped")
    train_until_killed(recipe)
    run, heard = Run(tmp_path / "stopped"), list[Event]()
    if elsewhere:
        run.plan_file.unlink()
    scaled_attention()
    resume(run, Console(quiet=True), listeners=[heard.append])
    assert weights_in(run.path) == expected
    assert not [event for event in heard if isinstance(event, Warned)]
    assert any(isinstance(event, Noted) and event.text.startswith("padded") for event in heard)
    assert Plan.from_json(run.plan_file.read_text()).batching == "padded"


@pytest.mark.parametrize("kind", GENERAL)
def test_a_model_of_which_nothing_is_known_trains_on_padded_rows(
    kind: str, recipe: Recipe, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    general = GENERAL[kind]
    recipe.model = str(general.save(tmp_path / kind, tiny_tokenizer))
    recipe.lora.target_modules = general.targets
    recipe.samples = int(kind != "mamba")  # whose reference code answers slowly
    recipe.training.learning_rate = 1e-2
    heard = list[Event]()
    whole = fine_tune(recipe, console=Console(quiet=True), listeners=[heard.append])
    notes = {event.title: event.text for event in heard if isinstance(event, Noted)}
    assert notes["batches"].endswith(f"{kind} is not known to keep packed examples apart")
    assert not [event for event in heard if isinstance(event, Warned)]
    heldout = [row["eval_loss"] for row in whole.metrics if "eval_loss" in row]
    assert heldout[-1] < heldout[0]
    recipe.output, stopped = str(tmp_path / "stopped"), Run(tmp_path / "stopped")
    train_until_killed(recipe)
    resume(stopped, Console(quiet=True))
    assert weights_in(stopped.path) == weights_in(tmp_path / "run")


@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_a_model_that_was_trained_in_int8_answers_in_int8_as_at_the_end_of_its_run(
    batches: str, recipe: Recipe, tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if batches == "padded":
        recipe.model = str(GENERAL["opt"].save(tmp_path / "opt", tiny_tokenizer))
    recipe.precision, recipe.training.epochs, recipe.training.learning_rate = "int8", 1, 3e-2
    result = fine_tune(recipe, console=Console(quiet=True))
    caplog.set_level("INFO", "huarizo")
    assistant = open_assistant(find_tuned(str(result.run.path)), on=torch.device("cpu"))
    assert caplog.messages == ["precision: int8, as in training"]
    assert Plan.from_json(result.run.plan_file.read_text()).batching == batches
    assert sum(isinstance(module, FrozenLoraLinear) for module in assistant.model.modules()) == 4
    again = compare(assistant, result.samples, max_new_tokens=80)
    assert again == result.samples and any(sample.before != sample.after for sample in again)


def test_windows_and_caps_resume_to_the_bit_on_packed_rows(recipe: Recipe, tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_small(small_config("gemma2", vocab_size=260), tmp_path / "gemma2")
    tiny_tokenizer.save_pretrained(folder)
    recipe.model, recipe.samples = str(folder), 0
    fine_tune(recipe, console=Console(quiet=True))
    assert Plan.from_json(Run(tmp_path / "run").plan_file.read_text()).batching == "packed"
    recipe.output, stopped = str(tmp_path / "stopped"), Run(tmp_path / "stopped")
    train_until_killed(recipe)
    resume(stopped, Console(quiet=True))
    assert weights_in(stopped.path) == weights_in(tmp_path / "run")


def test_what_peft_refuses_is_one_error(recipe: Recipe, tmp_path: Path, tiny_tokenizer: Any) -> None:
    recipe.model = str(GENERAL["mamba"].save(tmp_path / "mamba", tiny_tokenizer))
    recipe.lora.target_modules = ["out_proj"]
    with pytest.raises(RecipeError, match="peft refuses these settings: .* 'out_proj' is incompatible with Mamba"):
        fine_tune(recipe, console=Console(quiet=True))
