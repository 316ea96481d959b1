"""The lines printed before training starts: device, model, data, prompt, precision, memory and duration."""

import torch

from huarizo.data.tokens import TokenisedRows
from huarizo.events import Events
from huarizo.kernels import int8
from huarizo.kernels.libraries import libraries
from huarizo.kernels.tiers import torch_int8
from huarizo.machine import describe, device, minutes_in_float
from huarizo.model.load import read_config, weight_bytes
from huarizo.model.targets import left_out
from huarizo.recipe import names_of
from huarizo.runs import Run
from huarizo.training.prepare import Prepared

MUCH_WORK = 6e12  # operations; they take most CPUs a minute or more


def announce(prepared: Prepared, run: Run, events: Events) -> None:
    """Report what is about to be trained, as events."""
    recipe, data, plan = prepared.recipe, prepared.data, prepared.plan
    tokens = data.train.tokens
    events.note("device", describe(device(), plan.memory.weights))
    events.note("model", recipe.model)
    events.note("data", _data_line(prepared, run, tokens))
    for note in data.notes:
        events.note("note", note)
    events.note("held out", _counted(data.heldout) if data.heldout else "none")
    events.note("prompt", recipe.data.prompt.splitlines()[0])
    events.note("precision", f"{plan.choice.precision}: {plan.choice.reason}")
    if out := left_out(recipe.lora, read_config(prepared.model_source.path)):
        events.note("lora", f"all linear layers but those that PEFT has no LoRA for: {out}")
    checkpointing = ", activation checkpointing" if plan.activation_checkpointing else ""
    events.note("memory", f"{plan.micro_batch_tokens} tokens at once{checkpointing}")
    if device().type == "cpu":
        for title, line in cpu_lines(prepared, tokens).items():
            events.note(title, line)


def _counted(tokenised: TokenisedRows) -> str:
    """The number of rows, and of examples if a chat template makes several from one row."""
    examples = len(tokenised.dataset)
    rows = len(set(tokenised.dataset["row"]))
    return f"{rows} rows" + (f" in {examples} examples" if examples > rows else "")


def _data_line(prepared: Prepared, run: Run, tokens: int) -> str:
    recipe, data = prepared.recipe, prepared.data
    notes = [f"{len(data.train.cut)} cut at {recipe.data.max_length} tokens" if data.train.cut else ""]
    notes += [f"{len(data.train.left_out)} left out (no response within that)" if data.train.left_out else ""]
    notes += [f"{data.bad_row_count} bad rows skipped, see {run.skipped}" if data.problems else ""]
    names = ", ".join(names_of(recipe.data.train))
    line = f"{names}: {_counted(data.train)} ({data.format}), {tokens:,} tokens"
    return "; ".join([line, *(note for note in notes if note)])


def cpu_lines(prepared: Prepared, tokens: int) -> dict[str, str]:
    """Lines to show on a CPU, by title: missing kernels, and the estimated time if a float run takes over a minute.

    tokens: number of tokens in all training rows.
    """
    choice, training = prepared.plan.choice, prepared.recipe.training
    lines = {}
    if missing := _missing_kernels(choice.precision):
        lines["kernels"] = missing
    steps = -(-len(prepared.data.train.dataset) // training.batch_size)
    passes = training.max_steps / steps if training.max_steps else training.epochs
    weights = weight_bytes(read_config(prepared.model_source.path), "fp32", torch.float32) / 4
    operations = 4 * weights * tokens * passes  # forward and input gradient, two operations a multiply-add
    if choice.precision != "int8" and operations > MUCH_WORK:
        least, most = minutes_in_float(operations, choice.precision, device())
        slow = "" if int8.reason_against(choice.dtype) is None or torch_int8() else "slow without int8 products: "
        lines["time"] = f"{slow}about {least:.0f} to {most:.0f} minutes in {choice.precision}"
    return lines


def _missing_kernels(precision: str) -> str:
    """The kernels that there are not, and why; "" if all are there."""
    found = libraries(precision)
    names: dict[str, list[str]] = {}
    for name, library in found.items():
        if isinstance(library, str):
            names.setdefault(library, []).append(name)
    if not names:
        return ""
    all_of_them = any(len(of) == len(found) for of in names.values())
    missing = "; ".join(f"{'none' if all_of_them else 'no ' + ', '.join(of)}: {why}" for why, of in names.items())
    return f"{missing}. Plain torch computes the same, more slowly"
