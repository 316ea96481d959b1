"""The library's two entry points to training: train from a recipe, or resume a run.

Mistakes in recipe, data or names are found first (`huarizo.training.prepare`). Only then is the run folder written and
locked, and the run handed to `huarizo.training.session`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from huarizo.console import PlainConsole
from huarizo.data.rows import write_skipped
from huarizo.errors import Interrupted, UserError
from huarizo.events import Listener
from huarizo.files import make_folder, remove_leftovers, write_whole
from huarizo.host import rank, world_size
from huarizo.recipe import Recipe, to_yaml
from huarizo.runs import Run, new_run, unfinished_runs
from huarizo.training.announcement import announce
from huarizo.training.checkpoint import newest_first, newest_valid, step_of
from huarizo.training.compatibility import changes_since, same_training
from huarizo.training.interrupt import Signals, Stopped
from huarizo.training.lock import RunLock
from huarizo.training.prepare import Prepared, prepare
from huarizo.training.progress import Terminal
from huarizo.training.session import Result, Session, events_of


def fine_tune(
    recipe: Recipe,
    name: str = "run",
    console: Console | None = None,
    resume_instead: Callable[[Run], bool] | None = None,
    listeners: Sequence[Listener] = (),
) -> Result:
    """Train from a recipe.

    name: the recipe's name, used for the run folder.
    resume_instead: called with each unfinished run of the same training; if it returns True, that run is resumed.
    listeners: called with each event, in addition to the terminal; under torchrun, in the first process only.

    Raises:
        UserError: a mistake in recipe, data or names; nothing was changed.
        DivergedError: the loss diverged (a UserError as well).
        MachineError: no disk space or memory left; the message says what was saved.
        Interrupted: Ctrl-C, SIGTERM or `training.max_minutes`; the training so far is in a checkpoint.
    """
    began = time.monotonic()
    with _stoppable() as signals:
        unfinished = unfinished_runs(recipe.output, name) if resume_instead and world_size() == 1 else []
        if rank() == 0 and not unfinished:
            new_run(recipe.output, name)  # fails early if it can't be made
        prepared = prepare(recipe)
        for old in unfinished:
            if resume_instead and same_training(old.recipe(), prepared.recipe) and resume_instead(old):
                return _resume(old, _terminal(console), listeners, signals, time.monotonic())
        run = new_run(recipe.output, name) if rank() == 0 else Run(Path(recipe.output or "runs"))
        prepared.recipe.output = str(run.path)
        with _locked(run, signals) as lock:
            if lock is not None:
                remove_leftovers(run.path)
                _open_folder(run, prepared)
            terminal = _terminal(console)
            events = events_of(run, terminal, listeners)
            session = Session(prepared, run, terminal, events, signals, lock, began)
            with session.reported():
                announce(prepared, run, events)
                return session.train()


def resume(run: Run, console: Console | None = None, listeners: Sequence[Listener] = ()) -> Result:
    """Resume an interrupted run from its newest whole checkpoint.

    Raises:
        UserError: the run is complete, or its model, data or LoRA have changed.
        MachineError, Interrupted: as `fine_tune`.
    """
    began = time.monotonic()
    with _stoppable() as signals:
        return _resume(run, _terminal(console), listeners, signals, began)


def _resume(run: Run, terminal: Terminal, listeners: Sequence[Listener], signals: Signals, began: float) -> Result:
    if run.is_complete():
        raise UserError(f"{run.path}: this run is complete. Talk to it with `huarizo chat {run.path}`")
    with _locked(run, signals) as lock:
        if lock is not None:
            remove_leftovers(run.path)
            remove_leftovers(run.checkpoints)
        events = events_of(run, terminal, listeners)
        checkpoint, damaged = newest_valid(run.checkpoints, set_aside=lock is not None)
        for fault in damaged:
            events.warn(f"damaged checkpoint set aside: {fault}")
        prepared = prepare(run.recipe(), resumed=run)
        if checkpoint and checkpoint.batching != prepared.plan.batching:
            plan = prepared.plan.with_batching(checkpoint.batching, "as the run was started")
            prepared = replace(prepared, plan=plan)
        session = Session(prepared, run, terminal, events, signals, lock, began, checkpoint)
        changes = changes_since(checkpoint, prepared.recipe, session.facts) if checkpoint else []
        if lock is not None:
            write_whole(run.plan_file, prepared.plan.to_json())
        with session.reported():
            announce(prepared, run, events)
            if changes:
                events.warn(f"changed since, so not bit-identical: {'; '.join(changes)}")
            start = (
                f"resuming from step {checkpoint.step}"
                if checkpoint
                else "no checkpoint yet: starting from the first step"
            )
            events.note("", start)
            return session.train()


def _terminal(console: Console | None) -> Terminal:
    """A terminal that shows the events of the first process only."""
    return Terminal(PlainConsole(quiet=True) if rank() else console or PlainConsole())


def _open_folder(run: Run, prepared: Prepared) -> None:
    write_whole(run.recipe_file, to_yaml(prepared.recipe))
    write_whole(run.plan_file, prepared.plan.to_json())
    if prepared.data.problems:
        write_skipped(prepared.data.problems, run.skipped)


@contextmanager
def _stoppable() -> Iterator[Signals]:
    """Handle signals for a whole command. Raises Interrupted if one arrives before there is a run."""
    with Signals() as signals:
        try:
            yield signals
        except Stopped:
            raise Interrupted(f"stopped by {signals.received}; nothing was trained") from None


@contextmanager
def _locked(run: Run, signals: Signals) -> Iterator[RunLock | None]:
    """Make and lock the run folder. Yields the lock, or None in all but the first process.

    Raises:
        Interrupted: a signal arrived when there was nothing new to save; the message says what is saved.
        MachineError, UserError: as RunLock.
    """
    if rank():
        yield None
        return
    if run.checkpoints.is_symlink():
        raise UserError(
            f"{run.checkpoints}: is a link. Replace it with a folder: checkpoints must be inside the run folder"
        )
    make_folder(run.checkpoints)
    with RunLock(run.path) as lock:
        try:
            yield lock
        except Stopped:
            saved = newest_first(run.checkpoints)
            kept = f"step {step_of(saved[0])} is saved" if saved else "no step was trained"
            remedy = f". Resume with: huarizo resume {run.path}" if run.recipe_file.is_file() else ""
            raise Interrupted(f"stopped by {signals.received}; {kept}{remedy}") from None
