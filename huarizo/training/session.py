"""One process's work on a run, from a prepared recipe to the adapter.

Load the base, add LoRA, answer the sample prompts, measure the held-out loss; train; measure and answer again. The
adapter is the first result to be written. Everything is reported as events.
"""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from huarizo import events as happened
from huarizo.data.tokens import Example
from huarizo.errors import HuarizoError, MachineError
from huarizo.events import EventFile, Events, Listener
from huarizo.files import make_parent, remove_leftovers, require_space, whole_folder, write_manifest, write_whole
from huarizo.host import cache_folder, rank
from huarizo.inference.generate import Assistant, answers
from huarizo.inference.samples import Sample, samples_as_text, samples_from_text, samples_of
from huarizo.machine import device, from_first, keep_freed_memory
from huarizo.model.architectures.registry import architecture_of
from huarizo.model.batching import CHECKED_ROWS, IN_WORDS, Checked, base_of, check_batching, require_gradients
from huarizo.model.compile import compile_layers
from huarizo.model.frozen.peaks import peaks_of, write_peaks
from huarizo.model.lora import count_weights
from huarizo.results.card import CARD, adapter_card
from huarizo.results.report import save_loss_plot
from huarizo.runs import Run
from huarizo.training.checkpoint import Checkpoint, space_needed
from huarizo.training.compatibility import Facts, facts_of
from huarizo.training.interrupt import Signals, Stopped
from huarizo.training.loading import load_model
from huarizo.training.lock import LockLostError, RunLock
from huarizo.training.metrics import Metrics, Row
from huarizo.training.prepare import Prepared, changed_files
from huarizo.training.progress import Terminal
from huarizo.training.saving import Saver, Stopping
from huarizo.training.trainer import LoraTrainer, training_arguments


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its metrics, and the answers before and after training."""

    run: Run
    metrics: list[Row]
    samples: list[Sample]
    in_gguf: bool
    """Whether the tuned model can be written as GGUF."""


def events_of(run: Run, terminal: Terminal, listeners: Sequence[Listener] = ()) -> Events:
    """The events of a run. In the first process, the run folder keeps them and `listeners` are called."""
    return Events([terminal] if rank() else [EventFile(run.events), terminal, *listeners])


@dataclass(frozen=True)
class Session:
    """The work on a run.

    lock: the run's lock; None in all but the first process.
    began: `time.monotonic()` at the start of the command.
    checkpoint: the one to resume from; None starts at the first step.
    """

    prepared: Prepared
    run: Run
    terminal: Terminal
    events: Events
    signals: Signals
    lock: RunLock | None
    began: float
    checkpoint: Checkpoint | None = None

    @property
    def facts(self) -> Facts:
        """The entries of each checkpoint's manifest that describe this run."""
        data = self.prepared.data.train.fingerprint
        return facts_of(self.prepared.recipe, data, self.prepared.plan, device())

    @contextmanager
    def reported(self) -> Iterator[None]:
        """If the block ends the run early, report it as an event."""
        try:
            yield
        except LockLostError:  # the folder, and what is written in it, belong to another process now
            raise
        except (HuarizoError, Stopped) as error:
            self.events.add(happened.Stopped(reason=str(error) or f"by {self.signals.received}"))
            raise

    def train(self) -> Result:
        """Train to the end.

        Raises:
            MachineError, Interrupted: as `huarizo.training.finetune.fine_tune`.
            ModelError: the model's own code can't compute a loss, or no gradient reaches the LoRA.
        """
        model = load_model(self.prepared)
        if self.lock is not None and (peaks := peaks_of(base_of(model))):
            write_peaks(self.run.calibration, peaks)
        return self._with_checked_batching(model)._train(model)

    def _with_checked_batching(self, model: PeftModel) -> "Session":
        """This session with a batching that is right for the loaded model, as the first process finds it for all."""
        plan, rows = self.prepared.plan, self.prepared.data.train.dataset
        few = [Example.from_row(row) for row in rows.select(range(min(CHECKED_ROWS, len(rows)))).to_list()]
        text = from_first(lambda: json.dumps(asdict(check_batching(model, plan.batching, few))), device())
        checked = Checked(**json.loads(text))
        for fault in checked.faults:
            self.events.warn(f"{fault}. They are not used, so that training is slower but right")
        if checked.faults:
            plan = plan.with_batching(checked.batching, f"a faster way is not right for this {model.config.model_type}")
            if self.lock is not None:
                write_whole(self.run.plan_file, plan.to_json())
        if plan.batching != "packed":
            require_gradients(model, plan.batching, few)
        self.events.note("batches", f"{IN_WORDS[plan.batching]}: {plan.batching_reason}")
        return dataclasses.replace(self, prepared=dataclasses.replace(self.prepared, plan=plan))

    def _train(self, model: PeftModel) -> Result:
        prepared, run, plan = self.prepared, self.run, self.prepared.plan
        keep_freed_memory()
        trainable = model.num_parameters(only_trainable=True)
        if self.lock is not None:
            keep = prepared.recipe.training.keep
            require_space(run.path, space_needed(trainable, keep), "checkpoints and adapter")
        self.events.note("LoRA", f"{trainable:,} of {count_weights(model):,} parameters are trained")
        if plan.compiled:
            compile_layers(model)
        self.events.note(
            "layers", "compiled with the first step" if plan.compiled else f"not compiled: {plan.compilation}"
        )
        assistant = Assistant(model, prepared.data.encoder)
        samples = self._samples_before(assistant)
        metrics = Metrics(None if rank() else run.metrics, self.checkpoint.metrics if self.checkpoint else [])
        self.events.listeners.append(metrics)
        saver = Saver(
            run, prepared.recipe, self.facts, metrics, self.events, plan.micro_batch_tokens, samples_as_text(samples),
            self.lock,
        )  # fmt: skip
        self._optimise(self._trainer(model, saver), saver)
        base: Any = model.get_base_model()
        in_gguf = architecture_of(base.config).gguf is not None
        return self._finish(assistant, Result(run, metrics.rows, samples, in_gguf), saver)

    def _trainer(self, model: PeftModel, saver: Saver) -> LoraTrainer:
        recipe, plan, data = self.prepared.recipe, self.prepared.plan, self.prepared.data
        arguments = training_arguments(recipe, self.run, plan.choice, device(), plan.activation_checkpointing)
        limit = recipe.training.max_minutes
        return LoraTrainer(
            model,
            arguments,
            data.train.dataset,
            data.heldout.dataset if data.heldout else [],
            recipe,
            plan.micro_batch_tokens,
            batching=plan.batching,
            precision=plan.choice.precision,
            compiled=plan.compiled,
            events=self.events,
            saver=saver,
            stopping=Stopping(self.signals, limit, self.began, lambda: self.terminal.reader_left),
            elapsed_before=saver.metrics.elapsed_s,
        )

    def _optimise(self, trainer: LoraTrainer, saver: Saver) -> None:
        """Train all steps. The held-out loss is measured before the first and after the last."""
        heldout = self.prepared.data.heldout is not None
        if heldout and self.checkpoint is None:
            trainer.evaluate()
        with self.signals.patience(None):
            try:
                trainer.train_from(self.checkpoint)
            finally:
                self.terminal.close()
            if trainer.stopping and trainer.stopping.reason:
                raise saver.ending(trainer.stopping.reason, trainer.state)
        if heldout and "eval_loss" not in saver.metrics.rows[-1]:
            trainer.evaluate()

    def _samples_before(self, assistant: Assistant) -> list[Sample]:
        """The sample prompts, with the base model's answers."""
        prepared = self.prepared
        if rank():
            return []
        if self.checkpoint is not None:
            return samples_from_text(self.checkpoint.files["samples.jsonl"].decode())
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
            self.events.note("samples", f"{count} answered before and after")
        before = answers(assistant, [sample.question for sample in asked])
        samples = [dataclasses.replace(s, before=answer.text) for s, answer in zip(asked, before, strict=True)]
        write_whole(self.run.samples, samples_as_text(samples))
        return samples

    def _finish(self, assistant: Assistant, result: Result, saver: Saver) -> Result:
        """Write the adapter, then the answers after training and the plot."""
        if rank():
            return result
        run = self.run
        try:
            if self.lock is not None:
                self.lock.require_folder()
            self._save_adapter(run.adapter, assistant, result.metrics)
        except MachineError as error:
            raise MachineError(f"{error}. {self._rescued(assistant, result, saver)}") from None
        share = 100 * saver.seconds / (time.monotonic() - self.began)
        self.events.note("saving", f"took {saver.seconds:.1f} s, {share:.1f} % of the time")
        for fault in changed_files(self.prepared.data_sources):
            self.events.warn(f"{fault} changed during the run, which used the earlier content")
        after = answers(assistant, [sample.question for sample in result.samples])
        samples = [dataclasses.replace(s, after=a.text) for s, a in zip(result.samples, after, strict=True)]
        result = dataclasses.replace(result, samples=samples)
        write_whole(run.samples, samples_as_text(samples))
        saver.metrics.complete()
        remove_leftovers(run.path)
        remove_leftovers(run.checkpoints)
        save_loss_plot(run, result.metrics)
        self.events.add(happened.Done(adapter=str(run.adapter)))
        return result

    def _save_adapter(self, target: Path, assistant: Assistant, metrics: list[Row]) -> None:
        prepared = self.prepared
        with whole_folder(target) as folder:
            assistant.model.save_pretrained(str(folder), save_embedding_layers=False)
            prepared.data.encoder.tokenizer.save_pretrained(str(folder))
            card = adapter_card(prepared.recipe, prepared.model_source.reference, metrics)
            (folder / CARD).write_text(card, encoding="utf-8")
            write_manifest(folder)

    def _rescued(self, assistant: Assistant, result: Result, saver: Saver) -> str:
        """The run folder can't hold the adapter: save it in the cache folder instead. Describes what is saved where."""
        place = cache_folder() / "rescued" / f"{self.run.path.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        kept = f"{saver.kept()} in {self.run.checkpoints}" if saver.kept() else ""
        try:
            make_parent(place)
            self._save_adapter(place, assistant, result.metrics)
        except (MachineError, OSError) as error:
            return f"It could not be written elsewhere either ({error}); {kept or 'no step was saved'}"
        return f"The trained adapter is in {place}{'; ' + kept if kept else ''}"
