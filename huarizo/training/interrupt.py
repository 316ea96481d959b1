"""Ctrl-C and SIGTERM stop a run after the step it is in, with a checkpoint; a second one stops it at once."""

import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from huarizo.machine import world_size


class StopOnSignal(TrainerCallback):
    """Within `with StopOnSignal() as stop:` signals are noted; as a callback it asks for a checkpoint and the end."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wanted = self.received is not None
        if world_size() > 1:  # the processes stop after the same step
            flag = torch.tensor(int(wanted), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            wanted = bool(flag.item())
        if wanted and state.global_step < state.max_steps:
            self.received = self.received or "SIGTERM"
            control.should_save = True
            control.should_training_stop = True
