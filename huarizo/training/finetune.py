"""Train by a recipe, or resume a run: the library's two entry points to training.

Everything the user may have got wrong is found first (`huarizo.training.prepare`), and only then is the run's folder
written and locked. What follows is a `huarizo.training.session`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    """Train by a recipe.

    name: the recipe's, for the run folder.
    resume_instead: is asked, where an unfinished run of the same training is there, whether to resume that one.
    listeners: called with each event, beside the terminal.

    Raises:
        UserError: before anything was changed.
        MachineError: no disk space or memory left; the message says what was saved.
        Interrupted: after Ctrl-C or SIGTERM, or at `training.max_minutes`; what was trained is in a checkpoint.
    """
    began = time.monotonic()
    with _stoppable() as signals:
        unfinished = unfinished_runs(recipe.output, name) if resume_instead and world_size() == 1 else []
        if rank() == 0 and not unfinished:
            new_run(recipe.output, name)  # says at once if it can't be
        prepared = prepare(recipe)
        for old in unfinished:
            if resume_instead and same_training(old.recipe(), prepared.recipe) and resume_instead(old):
                return _resume(old, _terminal(console), listeners, signals, began)
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
        UserError: the run is complete, or model, data or LoRA are not those it was started with.
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
        session = Session(prepared, run, terminal, events, signals, lock, began, checkpoint)
        changes = changes_since(checkpoint, prepared.recipe, session.facts) if checkpoint else []
        if lock is not None:
            write_whole(run.plan_file, prepared.plan.to_json())
        with session.reported():
            announce(prepared, run, events)
            if changes:
                events.warn(f"changed since, so not bit-identical: {'; '.join(changes)}")
            start = f"going on from step {checkpoint.step}" if checkpoint else "no checkpoint yet: from the first step"
            events.note("", start)
            return session.train()


def _terminal(console: Console | None) -> Terminal:
    """The first process alone shows anything."""
    return Terminal(PlainConsole(quiet=True) if rank() else console or PlainConsole())


def _open_folder(run: Run, prepared: Prepared) -> None:
    write_whole(run.recipe_file, to_yaml(prepared.recipe))
    write_whole(run.plan_file, prepared.plan.to_json())
    if prepared.data.problems:
        write_skipped(prepared.data.problems, run.skipped)


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
