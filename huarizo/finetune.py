"""A recipe becomes a tuned model: the whole way of a run, step by step.

Everything the user may have got wrong is found first (`prepare`), before a model loads. Then the base is loaded, LoRA
added, the held-out loss and some answers taken, the model trained, and the same taken again.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from huarizo.data.packing import cut, pack
from huarizo.data.prepare import Data, prepare_data
from huarizo.data.prompts import OpenExchange
from huarizo.data.rows import write_skipped
from huarizo.errors import Interrupted, UserError
from huarizo.files import whole_folder, write_whole
from huarizo.hub.names import Source, resolve_data, resolve_model
from huarizo.machine import Choice, available_memory, cache_folder, choose_precision, device, micro_batch_tokens, rank
from huarizo.model.dropout import hash_dropouts
from huarizo.model.fast import compile_layers
from huarizo.model.int8_load import load_int8_base
from huarizo.model.load import activation_bytes_per_token, load_base, load_tokenizer, read_config, weight_bytes
from huarizo.model.lora import add_lora, count_weights
from huarizo.recipe import Recipe, to_yaml
from huarizo.results.chat import Assistant, answers
from huarizo.results.report import Sample, card, load_samples, save_loss_plot, save_samples
from huarizo.runs import Run, new_run
from huarizo.training.checkpoint import newest_valid
from huarizo.training.interrupt import StopOnSignal
from huarizo.training.progress import Metrics, ShowProgress
from huarizo.training.trainer import LoraTrainer, training_arguments

CALIBRATION_ROWS, CALIBRATION_TOKENS = 16, 2048  # at most; they show which input channels of the base stand out


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every name has been found and checked, with its data tokenised. `recipe` is resolved."""

    recipe: Recipe
    model_source: Source
    data: Data
    choice: Choice


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its metrics by step, and the answers before and after."""

    run: Run
    metrics: list[dict[str, Any]]
    samples: list[Sample]


def prepare(recipe: Recipe) -> Prepared:
    """Find model and data, read and tokenise the rows, choose the precision; nothing heavy is loaded.

    Raises:
        UserError: whatever the user can mend, with the remedy.
    """
    on = device()
    choice = choose_precision(recipe.precision, on)
    sources = {"model": resolve_model(recipe.model), "train": resolve_data(recipe.data.train)}
    if isinstance(recipe.data.eval, str):
        sources["eval"] = resolve_data(recipe.data.eval, heldout=True)
    for name, source in sources.items():
        _check_pinned(name, source, recipe.pinned.get(name, {}))
    config = read_config(sources["model"].path)
    eval_file = sources["eval"].path if "eval" in sources else None
    data = prepare_data(
        recipe.data, recipe.training.seed, sources["train"].path, eval_file,
        load_tokenizer(sources["model"].path), cache_folder() / "tokens",
    )  # fmt: skip
    resolved = recipe.model_copy(deep=True)
    _fit_memory(resolved, config, choice, available_memory(on))
    resolved.model = sources["model"].pinned
    resolved.data.train = sources["train"].pinned
    if "eval" in sources:
        resolved.data.eval = sources["eval"].pinned
    resolved.data.prompt = data.encoder.prompt.name
    resolved.precision = choice.precision
    resolved.pinned = {name: source.sha256 for name, source in sources.items()}
    return Prepared(resolved, sources["model"], data, choice)


def _fit_memory(recipe: Recipe, config: dict[str, Any], choice: Choice, available: int) -> None:
    """Choose the micro-batches, and activation checkpointing where not even the longest row fits without."""
    if recipe.training.micro_batch_tokens is not None:
        return
    free = available - weight_bytes(config, choice.precision, choice.dtype)
    tokens = micro_batch_tokens(activation_bytes_per_token(config, choice.dtype), free, device())
    if tokens < recipe.data.max_length and "gradient_checkpointing" not in recipe.trainer:
        recipe.trainer["gradient_checkpointing"] = True
        tokens = recipe.data.max_length
    recipe.training.micro_batch_tokens = max(tokens, 64)


def _check_pinned(name: str, source: Source, pinned: dict[str, str]) -> None:
    for file, digest in pinned.items():
        if source.sha256.get(file) != digest:
            raise UserError(
                f"{source.path}: {file} is not the file that this recipe was made with (its sha256 differs). Put the "
                f"file back, or remove pinned.{name} from the recipe to start a new run with what is there"
            )


def load_frozen(folder: Path, choice: Choice, rows: Any) -> Any:
    """The frozen base on this device, in the chosen precision.

    rows: the tokenised training rows; the first few of them show an int8 base which input channels stand out.
    """
    if choice.precision != "int8":
        return load_base(folder, choice.dtype, device())
    first = cut([len(ids) for ids in rows[:CALIBRATION_ROWS]["input_ids"]], CALIBRATION_TOKENS)[0]
    return load_int8_base(folder, choice.dtype, device(), pack([rows[index] for index in first]))


def load_model(prepared: Prepared) -> Any:
    """The frozen base with a new LoRA, as a PeftModel."""
    model = load_frozen(prepared.model_source.path, prepared.choice, prepared.data.train.dataset)
    model = add_lora(model, prepared.recipe.lora, prepared.recipe.training.seed)
    if device().type == "cpu":
        hash_dropouts(model, model.get_base_model().model)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = prepared.model_source.reference, prepared.model_source.revision
    return model


def fine_tune(recipe: Recipe, name: str = "run", console: Console | None = None) -> Result:
    """Train by a recipe. `name` is the recipe's name, for the run folder.

    Raises:
        UserError: before anything was changed.
        MachineError: no disk space or memory left; the message says what was saved.
        Interrupted: after Ctrl-C or SIGTERM; a checkpoint was written.
    """
    console = _console(console)
    run = new_run(recipe.output, name) if rank() == 0 else Run(Path(recipe.output or "runs"))
    prepared = prepare(recipe)
    prepared.recipe.output = str(run.path)
    if rank() == 0:
        _open_folder(run, prepared)
    _tell(console, prepared, run)
    return _train(prepared, run, console, checkpoint=None)


def resume(run: Run, console: Console | None = None) -> Result:
    """Go on with an interrupted run from its newest whole checkpoint.

    Raises:
        UserError: the run is complete, or model or data are not those it was started with.
    """
    console = _console(console)
    if (run.adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{run.path}: this run is complete. Talk to it with `huarizo chat {run.path}`")
    folder, damaged = newest_valid(run.checkpoints)
    for fault in damaged:
        console.print(Text(f"checkpoint passed over: {fault}", style="yellow"))
    prepared = prepare(run.recipe())
    _tell(console, prepared, run)
    start = f"going on from {folder.name}" if folder else "no checkpoint yet: starting from the first step"
    console.print(start)
    return _train(prepared, run, console, folder)


def _console(console: Console | None) -> Console:
    if rank():
        return Console(quiet=True)
    return console or Console(markup=False, highlight=False)


def _open_folder(run: Run, prepared: Prepared) -> None:
    write_whole(run.recipe_file, to_yaml(prepared.recipe))
    run.checkpoints.mkdir(exist_ok=True)
    if prepared.data.problems:
        write_skipped(prepared.data.problems, run.skipped)


def _tell(console: Console, prepared: Prepared, run: Run) -> None:
    """What is about to be trained, in a few lines."""
    recipe, data = prepared.recipe, prepared.data
    lengths = data.train.dataset.with_format("arrow")
    tokens = sum(len(ids) for batch in lengths.iter(1000) for ids in batch["input_ids"])
    notes = [f"{len(data.train.cut)} cut at {recipe.data.max_length} tokens" if data.train.cut else ""]
    notes += [f"{len(data.train.left_out)} left out (no response within that)" if data.train.left_out else ""]
    notes += [f"{data.bad_row_count} bad rows skipped, see {run.skipped}" if data.problems else ""]
    lines = {
        "model": recipe.model,
        "data": f"{recipe.data.train}: {len(data.train.dataset)} rows ({data.format}), {tokens:,} tokens"
        + "".join(f"; {note}" for note in notes if note),
        "held out": f"{len(data.heldout.dataset)} rows" if data.heldout else "none",
        "prompt": recipe.data.prompt.splitlines()[0],
        "precision": f"{prepared.choice.precision}: {prepared.choice.reason}",
        "memory": f"{recipe.training.micro_batch_tokens} tokens at once"
        + (", activation checkpointing" if recipe.trainer.get("gradient_checkpointing") else ""),
    }
    for key, value in lines.items():
        console.print(Text(f"{key:<10} {value}"), soft_wrap=True)


def _train(prepared: Prepared, run: Run, console: Console, checkpoint: Path | None) -> Result:
    recipe = prepared.recipe
    model = load_model(prepared)
    trainable = model.num_parameters(only_trainable=True)
    console.print(f"{'LoRA':<10} {trainable:,} of {count_weights(model):,} parameters are trained", soft_wrap=True)
    reason = compile_layers(model, device()) if recipe.training.compile else "as the recipe asks"
    console.print(
        f"{'layers':<10} {f'not compiled: {reason}' if reason else 'compiled with the first step'}", soft_wrap=True
    )
    args = training_arguments(recipe, run, prepared.choice, device())
    heldout = prepared.data.heldout.dataset if prepared.data.heldout else []
    trainer = LoraTrainer(
        model, args, prepared.data.train.dataset, heldout, recipe, run, recipe.training.micro_batch_tokens or 4096,
        compiled=reason is None,
    )  # fmt: skip
    step = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    metrics = Metrics(run.metrics if rank() == 0 else Path(os.devnull), keep_until=step if checkpoint else None)
    progress = ShowProgress(metrics, console, device())
    trainer.add_callback(progress)
    assistant = Assistant(model, prepared.data.encoder)
    samples = _samples_before(assistant, prepared, run, console, fresh=checkpoint is None)
    if heldout and checkpoint is None:
        trainer.evaluate()
    try:
        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    if stop.received:
        raise Interrupted(
            f"stopped by {stop.received} after step {trainer.state.global_step} of {trainer.state.max_steps}, which is "
            f"saved. Go on with: huarizo resume {run.path}"
        )
    if heldout and metrics.rows[-1].get("eval_loss") is None:
        trainer.evaluate()
    return _finish(assistant, prepared, Result(run, metrics.rows, samples))


def _samples_before(assistant: Assistant, prepared: Prepared, run: Run, console: Console, fresh: bool) -> list[Sample]:
    """The prompts that are answered before and after, with the answers before."""
    if rank():
        return []
    if not fresh and run.samples.is_file():
        return load_samples(run)
    wanted = prepared.recipe.samples
    if isinstance(wanted, list):
        turns = [(OpenExchange(prompt), "") for prompt in wanted]
    else:
        rows = (prepared.data.heldout_rows or prepared.data.rows)[:wanted]
        turns = [(OpenExchange(r.exchanges[0].instruction, r.exchanges[0].input), r.exchanges[0].output) for r in rows]
    if turns:
        console.print(f"{'samples':<10} {len(turns)} prompts are answered before and after", soft_wrap=True)
    before = answers(assistant, [turn for turn, _ in turns])
    samples = [
        Sample(turn.instruction, turn.input, answer, None, expected)
        for (turn, expected), answer in zip(turns, before, strict=True)
    ]
    save_samples(run, samples)
    return samples


def _finish(assistant: Assistant, prepared: Prepared, result: Result) -> Result:
    """The adapter, the answers after, and the plot."""
    if rank():
        return result
    turns = [OpenExchange(sample.instruction, sample.input) for sample in result.samples]
    after = answers(assistant, turns)
    samples = [dataclasses.replace(s, after=text) for s, text in zip(result.samples, after, strict=True)]
    result = dataclasses.replace(result, samples=samples)
    save_samples(result.run, samples)
    save_loss_plot(result.run, result.metrics)
    with whole_folder(result.run.adapter) as folder:
        assistant.model.save_pretrained(str(folder), save_embedding_layers=False)
        prepared.data.encoder.tokenizer.save_pretrained(str(folder))
        (folder / "README.md").write_text(card(prepared.recipe, prepared.model_source.reference, result.metrics))
    return result
