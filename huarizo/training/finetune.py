"""A recipe becomes a tuned model: the whole way of a run, step by step.

Everything the user may have got wrong is found first (`huarizo.training.prepare`). Then the base is loaded, LoRA added,
the held-out loss and some answers taken, the model trained, and the same taken again.
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from huarizo.console import PlainConsole
from huarizo.data.packing import pack_within
from huarizo.data.rows import write_skipped
from huarizo.data.tokens import Example, TokenisedRows
from huarizo.errors import Interrupted, MachineError, UserError
from huarizo.files import (
    make_folder,
    make_parent,
    remove_leftovers,
    require_space,
    whole_folder,
    write_manifest,
    write_whole,
)
from huarizo.host import cache_folder, int8_instructions, rank, world_size
from huarizo.inference.generate import Assistant, answers
from huarizo.inference.samples import Sample, samples_as_text, samples_from_text, samples_of
from huarizo.kernels.dropout import reason_against
from huarizo.machine import Choice, describe, device, minutes_in_float
from huarizo.model.added_tokens import lengthen, rows_to_train
from huarizo.model.compile import compile_layers
from huarizo.model.frozen.load import load_int8_base
from huarizo.model.load import load_base, read_config, weight_bytes
from huarizo.model.lora import add_lora, count_weights
from huarizo.recipe import Recipe, names_of, to_yaml
from huarizo.results.card import CARD, adapter_card
from huarizo.results.report import save_loss_plot
from huarizo.runs import Run, new_run, unfinished_runs
from huarizo.training.checkpoint import Checkpoint, newest_first, newest_valid, space_needed, step_of
from huarizo.training.compatibility import compare, compared_compilation, facts_of, same_training
from huarizo.training.interrupt import Signals, Stopped
from huarizo.training.lock import RunLock
from huarizo.training.prepare import Prepared, changed_files, prepare
from huarizo.training.progress import Metrics, ShowProgress
from huarizo.training.saving import SaveAndStop
from huarizo.training.trainer import LoraTrainer, training_arguments

MUCH_WORK = 6e12  # operations, a minute or more of most CPUs
CALIBRATION_ROWS, CALIBRATION_TOKENS = 16, 2048  # at most; they show which input channels of the base stand out


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its metrics by step, and the answers before and after."""

    run: Run
    metrics: list[dict[str, Any]]
    samples: list[Sample]


def load_frozen(folder: Path, choice: Choice, rows: Any) -> Any:
    """The frozen base on this device, in the chosen precision.

    rows: the tokenised training rows; the first few of them show an int8 base which input channels stand out.
    """
    if choice.precision != "int8":
        return load_base(folder, choice.dtype, device())
    examples = [Example.from_row(row) for row in itertools.islice(rows, CALIBRATION_ROWS)]
    return load_int8_base(folder, choice.dtype, device(), next(pack_within(CALIBRATION_TOKENS, examples)))


def load_model(prepared: Prepared) -> Any:
    """The frozen base with a new LoRA, as a PeftModel."""
    recipe, tokenizer = prepared.recipe, prepared.data.encoder.tokenizer
    model = load_frozen(prepared.model_source.path, prepared.choice, prepared.data.train.dataset)
    tokens = rows_to_train(tokenizer, recipe.data.special_tokens or [], model.config.vocab_size)
    lengthen(model, max(tokens, default=-1) + 1)
    model = add_lora(model, recipe.lora, recipe.training.seed, tokens)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = prepared.model_source.reference, prepared.model_source.revision
    return model


def fine_tune(
    recipe: Recipe, name: str = "run", console: Console | None = None, go_on: Callable[[Run], bool] | None = None
) -> Result:
    """Train by a recipe.

    name: the recipe's, for the run folder.
    go_on: is asked, where an unfinished run of the same training is there, whether to go on with it instead.

    Raises:
        UserError: before anything was changed.
        MachineError: no disk space or memory left; the message says what was saved.
        Interrupted: after Ctrl-C or SIGTERM, or at `training.max_minutes`; what was trained is in a checkpoint.
    """
    with _stoppable() as signals:
        return _fine_tune(recipe, name, _console(console), go_on, signals)


def _fine_tune(
    recipe: Recipe, name: str, console: Console, go_on: Callable[[Run], bool] | None, signals: Signals
) -> Result:
    began = time.monotonic()
    unfinished = unfinished_runs(recipe.output, name) if go_on and world_size() == 1 else []
    if rank() == 0 and not unfinished:
        new_run(recipe.output, name)  # says at once if it can't be
    prepared = prepare(recipe)
    for old in unfinished:
        if go_on and same_training(old.recipe(), prepared.recipe) and go_on(old):
            return _resume(old, console, signals)
    run = new_run(recipe.output, name) if rank() == 0 else Run(Path(recipe.output or "runs"))
    prepared.recipe.output = str(run.path)
    with _locked(run, signals) as lock:
        if lock is not None:
            remove_leftovers(run.path)
            _open_folder(run, prepared)
        _tell(console, prepared, run)
        return _train(Session(prepared, run, console, signals, lock, began), None)


def resume(run: Run, console: Console | None = None) -> Result:
    """Go on with an interrupted run from its newest whole checkpoint.

    Raises:
        UserError: the run is complete, or model, data or LoRA are not those it was started with.
        MachineError, Interrupted: as `fine_tune`.
    """
    with _stoppable() as signals:
        return _resume(run, _console(console), signals)


def _resume(run: Run, console: Console, signals: Signals) -> Result:
    began = time.monotonic()
    if run.is_complete():
        raise UserError(f"{run.path}: this run is complete. Talk to it with `huarizo chat {run.path}`")
    with _locked(run, signals) as lock:
        if lock is not None:
            remove_leftovers(run.path)
            remove_leftovers(run.checkpoints)
        checkpoint, damaged = newest_valid(run.checkpoints, set_aside=lock is not None)
        for fault in damaged:
            console.print(Text(f"damaged checkpoint set aside: {fault}", style="yellow"))
        prepared = prepare(run.recipe(), resumed=True)
        session = Session(prepared, run, console, signals, lock, began)
        changes = compare(checkpoint, prepared.recipe, session.facts) if checkpoint else []
        _tell(console, prepared, run)
        if changes:
            console.print(Text(f"changed since, so not bit-identical: {'; '.join(changes)}", style="yellow"))
        start = f"going on from step {checkpoint.step}" if checkpoint else "no checkpoint yet: from the first step"
        console.print(start)
        return _train(session, checkpoint)


@contextmanager
def _stoppable() -> Iterator[Signals]:
    """The signals of a command. Raises Interrupted where one came before there was a run."""
    with Signals() as signals:
        try:
            yield signals
        except Stopped:
            raise Interrupted(f"stopped by {signals.received}; nothing was trained") from None


@contextmanager
def _locked(run: Run, signals: Signals) -> Iterator[RunLock | None]:
    """The run folder's lock, for the first process of a run; None for the others.

    Raises:
        Interrupted: a signal came where there was nothing to save; the message says what is there.
        MachineError, UserError: as RunLock.
    """
    if rank():
        yield None
        return
    if run.checkpoints.is_symlink():
        raise UserError(f"{run.checkpoints}: is a link. Checkpoints stand in the run's own folder: put them there")
    make_folder(run.checkpoints)
    with RunLock(run.path) as lock:
        try:
            yield lock
        except Stopped:
            there = newest_first(run.checkpoints)
            kept = f"step {step_of(there[0])} is saved" if there else "no step was trained"
            go_on = f". Go on with: huarizo resume {run.path}" if run.recipe_file.is_file() else ""
            raise Interrupted(f"stopped by {signals.received}; {kept}{go_on}") from None


def _console(console: Console | None) -> Console:
    if rank():
        return PlainConsole(quiet=True)
    return console or PlainConsole()


def _open_folder(run: Run, prepared: Prepared) -> None:
    write_whole(run.recipe_file, to_yaml(prepared.recipe))
    if prepared.data.problems:
        write_skipped(prepared.data.problems, run.skipped)


def _counted(tokenised: TokenisedRows) -> str:
    """How many rows there are, and how many examples where a chat template makes more of them."""
    examples = len(tokenised.dataset)
    rows = len(set(tokenised.dataset["row"]))
    return f"{rows} rows" + (f" in {examples} examples" if examples > rows else "")


def _tell(console: Console, prepared: Prepared, run: Run) -> None:
    """What is about to be trained, in a few lines."""
    recipe, data = prepared.recipe, prepared.data
    lengths = data.train.dataset.with_format("arrow")
    tokens = sum(len(ids) for batch in lengths.iter(1000) for ids in batch["input_ids"])
    notes = [f"{len(data.train.cut)} cut at {recipe.data.max_length} tokens" if data.train.cut else ""]
    notes += [f"{len(data.train.left_out)} left out (no response within that)" if data.train.left_out else ""]
    notes += [f"{data.bad_row_count} bad rows skipped, see {run.skipped}" if data.problems else ""]
    config = read_config(prepared.model_source.path)
    lines = {
        "device": describe(device(), weight_bytes(config, prepared.choice.precision, prepared.choice.dtype)),
        "model": recipe.model,
        "data": f"{', '.join(names_of(recipe.data.train))}: {_counted(data.train)} ({data.format}), "
        f"{tokens:,} tokens" + "".join(f"; {note}" for note in notes if note),
        "held out": _counted(data.heldout) if data.heldout else "none",
        "prompt": recipe.data.prompt.splitlines()[0],
        "precision": f"{prepared.choice.precision}: {prepared.choice.reason}",
        "memory": f"{recipe.training.micro_batch_tokens} tokens at once"
        + (", activation checkpointing" if recipe.trainer.get("gradient_checkpointing") else ""),
    }
    if device().type == "cpu":
        lines |= _told_of_the_cpu(prepared, tokens)
    for key, value in lines.items():
        console.print(Text(f"{key:<10} {value}"), soft_wrap=True)
        for note in data.notes if key == "data" else ():
            console.print(Text(f"{'note':<10} {note}"), soft_wrap=True)


def _told_of_the_cpu(prepared: Prepared, tokens: int) -> dict[str, str]:
    """What runs without a kernel of its own, and how long a training in float takes, where that is more than a minute.

    tokens: of all rows.
    """
    choice, training = prepared.choice, prepared.recipe.training
    lines = {}
    if reason := reason_against(choice.dtype):
        lines["kernels"] = f"none, plain torch instead: {reason}"
    steps = -(-len(prepared.data.train.dataset) // training.batch_size)
    passes = training.max_steps / steps if training.max_steps else training.epochs
    weights = weight_bytes(read_config(prepared.model_source.path), "fp32", torch.float32) / 4
    operations = 4 * weights * tokens * passes  # forward and input gradient, two operations a multiply-add
    if choice.precision != "int8" and operations > MUCH_WORK:
        least, most = minutes_in_float(operations, choice.precision, device())
        why = "" if int8_instructions() else "slow here, for want of int8 instructions (VNNI, AMX): "
        lines["time"] = f"{why}about {least:.0f} to {most:.0f} minutes in {choice.precision}"
    return lines


@dataclass(frozen=True)
class Session:
    """One process's work on a run. `lock` is None in all but the first process; `began`: `time.monotonic()`."""

    prepared: Prepared
    run: Run
    console: Console
    signals: Signals
    lock: RunLock | None
    began: float

    @property
    def facts(self) -> dict[str, Any]:
        """What the checkpoints' manifests say of this run."""
        data = self.prepared.data.train.fingerprint
        return facts_of(self.prepared.recipe, data, self.prepared.choice.precision, device())


def _train(session: Session, checkpoint: Checkpoint | None) -> Result:
    prepared, run, console = session.prepared, session.run, session.console
    recipe = prepared.recipe
    model = load_model(prepared)
    trainable = model.num_parameters(only_trainable=True)
    if session.lock is not None:
        require_space(run.path, space_needed(trainable, recipe.training.keep), "checkpoints and adapter")
    console.print(f"{'LoRA':<10} {trainable:,} of {count_weights(model):,} parameters are trained", soft_wrap=True)
    reason = compile_layers(model, device()) if recipe.training.compile else "as the recipe asks"
    console.print(
        f"{'layers':<10} {f'not compiled: {reason}' if reason else 'compiled with the first step'}", soft_wrap=True
    )
    if checkpoint and (change := compared_compilation(checkpoint, reason)):
        console.print(Text(f"changed since, so not bit-identical: {change}", style="yellow"), soft_wrap=True)
    metrics = Metrics(run.metrics, checkpoint.metrics if checkpoint else None)
    facts = session.facts | {"compiled": reason is None}
    saving = SaveAndStop(
        recipe, run.checkpoints, facts, metrics, console, session.signals, session.lock, session.began
    )  # fmt: skip
    trainer = LoraTrainer(
        model, training_arguments(recipe, run, prepared.choice, device()), prepared.data.train.dataset,
        prepared.data.heldout.dataset if prepared.data.heldout else [], recipe, run,
        recipe.training.micro_batch_tokens or 4096, compiled=reason is None, saving=saving,
    )  # fmt: skip
    progress = ShowProgress(metrics, console, device(), trainer)
    trainer.add_callback(progress)
    assistant = Assistant(model, prepared.data.encoder)
    samples = _samples_before(assistant, session, checkpoint)
    saving.samples = samples_as_text(samples)
    if prepared.data.heldout and checkpoint is None:
        trainer.evaluate()
    with session.signals.patience(None):
        try:
            trainer.go_on(checkpoint)
        finally:
            progress.close()
        if saving.stopped:
            _say_stopped(saving, trainer.state, run)
    if prepared.data.heldout and "eval_loss" not in metrics.rows[-1]:
        trainer.evaluate()
    return _finish(assistant, session, Result(run, metrics.rows, samples), saving)


def _say_stopped(saving: SaveAndStop, state: Any, run: Run) -> None:
    """Raises what a run ends with that was stopped before its end."""
    where = f"stopped {saving.stopped} after step {state.global_step} of {state.max_steps}"
    if saving.failure is not None:
        kept = f"Step {saving.saved_step} is safe" if saving.saved_step >= 0 else "No step was saved"
        raise MachineError(f"{where}, which could not be saved: {saving.failure}. {kept} in {run.checkpoints}")
    raise Interrupted(f"{where}, which is saved. Go on with: huarizo resume {run.path}")


def _samples_before(assistant: Assistant, session: Session, checkpoint: Checkpoint | None) -> list[Sample]:
    """The prompts that are answered before and after, with the answers before."""
    prepared, run, console = session.prepared, session.run, session.console
    if rank():
        return []
    if checkpoint is not None:
        return samples_from_text(checkpoint.files["samples.jsonl"].decode())
    wanted = prepared.recipe.samples
    if isinstance(wanted, list):
        asked = [Sample(prompt, "", "", None) for prompt in wanted]
    else:
        refused = prepared.data.train.refused
        good = [row for index, row in enumerate(prepared.data.rows) if index not in refused]
        every = samples_of(prepared.data.heldout_rows or good)
        asked = list(itertools.islice((sample for sample in every if assistant.fits(sample.question)), wanted))
    if asked:
        count = "1 prompt is" if len(asked) == 1 else f"{len(asked)} prompts are"
        console.print(f"{'samples':<10} {count} answered before and after", soft_wrap=True)
    before = answers(assistant, [sample.question for sample in asked])
    samples = [dataclasses.replace(s, before=answer.text) for s, answer in zip(asked, before, strict=True)]
    write_whole(run.samples, samples_as_text(samples))
    return samples


def _finish(assistant: Assistant, session: Session, result: Result, saving: SaveAndStop) -> Result:
    """The adapter first, because it is the result; then the answers after, and the plot."""
    if rank():
        return result
    run, console = session.run, session.console
    try:
        if session.lock is not None:
            session.lock.require_folder()
        _save_adapter(run.adapter, assistant, session, result.metrics)
    except MachineError as error:
        raise MachineError(f"{error}. {_rescued(assistant, session, result, saving)}") from None
    share = 100 * saving.seconds / (time.monotonic() - session.began)
    console.print(f"{'saving':<10} took {saving.seconds:.1f} s, {share:.1f} % of the time", soft_wrap=True)
    for fault in changed_files(session.prepared.data_sources):
        console.print(Text(f"{fault} changed during the run, which used it as it was", style="yellow"))
    after = answers(assistant, [sample.question for sample in result.samples])
    samples = [dataclasses.replace(s, after=a.text) for s, a in zip(result.samples, after, strict=True)]
    result = dataclasses.replace(result, samples=samples)
    write_whole(run.samples, samples_as_text(samples))
    saving.metrics.complete()
    remove_leftovers(run.path)
    remove_leftovers(run.checkpoints)
    save_loss_plot(run, result.metrics)
    return result


def _save_adapter(target: Path, assistant: Assistant, session: Session, metrics: list[dict[str, Any]]) -> None:
    prepared = session.prepared
    with whole_folder(target) as folder:
        assistant.model.save_pretrained(str(folder), save_embedding_layers=False)
        prepared.data.encoder.tokenizer.save_pretrained(str(folder))
        (folder / CARD).write_text(
            adapter_card(prepared.recipe, prepared.model_source.reference, metrics), encoding="utf-8"
        )
        write_manifest(folder)


def _rescued(assistant: Assistant, session: Session, result: Result, saving: SaveAndStop) -> str:
    """The run's folder can't take the adapter: put it where it can be found, and say where."""
    place = cache_folder() / "rescued" / f"{session.run.path.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    kept = f"step {saving.saved_step} is safe in {session.run.checkpoints}" if saving.saved_step >= 0 else ""
    try:
        make_parent(place)
        _save_adapter(place, assistant, session, result.metrics)
    except (MachineError, OSError) as error:
        return f"Nor could it be written elsewhere ({error}); {kept or 'no step was saved'}"
    return f"The trained adapter is in {place}{'; ' + kept if kept else ''}"
