"""Transformers' Trainer, with one difference: a batch is one whole optimizer step.

The loader yields a `Step`. This trainer cuts it into micro-batches, packed or padded, computes the loss at labelled
positions, and normalises it by the labelled tokens of the whole step, across all micro-batches and processes.
Schedules, optimizers, callbacks, trackers and mixed precision are the Trainer's own. `huarizo.training.checkpoint`
writes the checkpoints.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from huarizo.data.packing import Step, StepCollator, StepLoader, StepSampler
from huarizo.data.padding import Batch
from huarizo.data.tokens import Example, TokenisedRow
from huarizo.errors import MachineError
from huarizo.events import Events, OutOfMemory
from huarizo.host import rank, world_size
from huarizo.machine import is_out_of_memory
from huarizo.model.batching import base_of, losses_of
from huarizo.model.compile import uncompiled
from huarizo.model.dropout import DropoutMasks
from huarizo.model.lora import count_weights
from huarizo.model.neftune import EmbeddingNoise
from huarizo.plan import LEAST_TOKENS, Batching, Choice
from huarizo.recipe import Recipe
from huarizo.runs import Run
from huarizo.training.checkpoint import Checkpoint, Trained, generators
from huarizo.training.divergence import LossWatch
from huarizo.training.interrupt import GRACE, Stopped
from huarizo.training.loop import Loop
from huarizo.training.saving import Saver, Stopping


def training_arguments(
    recipe: Recipe, run: Run, choice: Choice, on: torch.device, activation_checkpointing: bool = False
) -> TrainingArguments:
    """The recipe as TrainingArguments. `recipe.trainer` may set any field that the recipe has no setting for."""
    training = recipe.training
    defaults: dict[str, Any] = {
        "logging_steps": 1,
        "report_to": "none",
        "ddp_broadcast_buffers": False,  # the frozen base is the same everywhere, and int8 weights are buffers
        "ddp_find_unused_parameters": False,
    }
    if activation_checkpointing:
        defaults["gradient_checkpointing"] = True
    args = TrainingArguments(
        **(defaults | recipe.trainer),
        output_dir=str(run.path),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        seed=training.seed,
        eval_strategy="steps" if training.eval_every else "no",
        eval_steps=training.eval_every,
        save_strategy="no",  # `huarizo.training.saving` decides when
        logging_nan_inf_filter=False,
        fp16=choice.dtype == torch.float16,
        use_cpu=on.type == "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # keeps the Trainer from copying the model to other GPUs (DataParallel)
    return args


class LoraTrainer(Trainer):
    """Trains a PeftModel on tokenised rows.

    Args:
        model: the PeftModel; it takes the attention that `batching` needs.
        args: from `training_arguments`.
        rows: the training rows, each with `input_ids` and `labels`.
        heldout: rows for the held-out loss; may be empty.
        recipe: the resolved recipe.
        budget: micro-batch size in tokens.
        batching: how examples go through the model.
        precision: precision of the frozen base.
        compiled: whether the decoder layers are compiled (`huarizo.model.compile`).
        events: gets everything that happens.
        saver: writes checkpoints; None writes none.
        stopping: decides whether to stop early; None never does.
        elapsed_before: seconds of training before the run was resumed.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        rows: Dataset | list,
        heldout: Dataset | list,
        recipe: Recipe,
        budget: int,
        *,
        batching: Batching = "packed",
        precision: str = "fp32",
        compiled: bool = False,
        events: Events | None = None,
        saver: Saver | None = None,
        stopping: Stopping | None = None,
        elapsed_before: float = 0.0,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=rows, eval_dataset=heldout)  # pyright: ignore[reportArgumentType]
        self.remove_callback(PrinterCallback)
        self.recipe, self.budget, self.precision = recipe, budget, precision
        self.events, self.saver, self.stopping = events or Events(), saver, stopping
        self.watch, self.last_loss, self.last_finite = LossWatch(), 0.0, True
        self.checkpoint: Checkpoint | None = None  # the one the run is resumed from
        self.loop = Loop(self, elapsed_before)
        self.add_callback(self.loop)
        self.num_weights = count_weights(model)
        base = base_of(model)
        self.masks = DropoutMasks(model, recipe.training.seed, budget)
        alpha, self.neftune_noise_alpha = (
            self.neftune_noise_alpha,
            None,
        )  # the Trainer's takes a pack for a row
        self.noise = EmbeddingNoise(base, alpha, recipe.training.seed) if alpha else None
        self.losses = losses_of(base, batching, compiled)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; for LoRA+, with a learning rate of its own for B."""
        ratio = self.recipe.lora.loraplus_lr_ratio
        if ratio is not None and self.optimizer is None:
            from peft.optimizers import create_loraplus_optimizer

            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # pyright: ignore
            decay = {"loraplus_weight_decay": self.args.weight_decay}
            assert isinstance(self.model, PeftModel)
            self.optimizer = create_loraplus_optimizer(self.model, kind, loraplus_lr_ratio=ratio, **decay, **options)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> StepLoader:
        training = self.recipe.training
        assert self.train_dataset is not None
        sampler = StepSampler(len(self.train_dataset), training.batch_size, training.seed)  # pyright: ignore[reportArgumentType]
        return StepLoader(self.train_dataset, batch_sampler=sampler, collate_fn=StepCollator(rank(), world_size()))  # pyright: ignore[reportArgumentType]

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The next `Step`. It knows its number of labels, so the Trainer need not count them."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def floating_point_ops(self, inputs: Any) -> int:
        """4 FLOP per frozen base weight and token: forward and input gradient."""
        return 4 * inputs.num_tokens * self.num_weights

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute the gradients of one optimizer step; returns its loss. Out of memory: halve the micro-batches."""
        model.train()
        with self._patience(GRACE):
            loss = self._accumulate_in_memory(model, inputs)
        self.state.num_input_tokens_seen += inputs.num_tokens
        self._skip_unless_finite(model, loss)
        return loss

    def _patience(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """Delay signals within a block. Several processes don't: they decide together after the step."""
        if self.stopping is None or world_size() > 1:
            return contextlib.nullcontext()
        return self.stopping.signals.patience(seconds)

    def _accumulate_in_memory(self, model: torch.nn.Module, inputs: Step) -> torch.Tensor:
        """As `_accumulate`, with smaller micro-batches if memory runs out."""
        while True:
            try:
                return self._accumulate(model, inputs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.budget <= LEAST_TOKENS or world_size() > 1:
                    raise MachineError(
                        "not enough memory, even for the smallest micro-batch. Use a smaller data.max_length, or "
                        "trainer.gradient_checkpointing=true"
                    ) from None
                self.budget = max(LEAST_TOKENS, min(self.budget, 2 * inputs.longest) // 2)
            model.zero_grad()
            torch.cuda.empty_cache()
            self.events.add(OutOfMemory(step=self.state.global_step + 1, micro_batch_tokens=self.budget))

    def _skip_unless_finite(self, model: torch.nn.Module, loss: torch.Tensor) -> None:
        """Keep weights and moments unchanged, in all processes, if the loss or gradients of a step are not finite.

        The optimizer skips parameters without gradients. A loss scaler has to see the fault itself, so that it skips
        the optimizer step, fused or not, and lowers its scale: it gets gradients of NaN.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = (loss + norm.to(loss.device)).isfinite()
        mean = torch.stack([loss.float(), finite.float()])
        if world_size() > 1:
            mean = self.accelerator.reduce(mean, "mean")  # pyright: ignore
        self.last_loss, share_finite = mean.tolist()  # pyright: ignore
        self.last_finite = share_finite == 1 and math.isfinite(self.last_loss)
        if self.last_finite:
            return
        for parameter in parameters:
            parameter.grad = None if self.scaler is None else torch.full_like(parameter, math.nan)

    def _accumulate(self, model: torch.nn.Module, step: Step) -> torch.Tensor:
        """Compute and add up the gradients of all micro-batches; returns the step's loss, float32 []."""
        total = torch.zeros((), device=self.args.device)
        batches = step.micro_batches(self.budget, self.losses.within)
        for index, batch in enumerate(batches):
            last, batch = index == len(batches) - 1, batch.to(self.args.device)
            self.masks.draw(self.state.global_step, batch.places)
            if self.noise is not None:
                self.noise.draw(self.state.global_step, batch.places, batch.lengths)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = self.compute_loss(model, batch, num_items_in_batch=step.num_labels)
                self.accelerator.backward(loss)
            total += loss.detach().to(total.device)
        return total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Summed loss of a batch, divided by the labelled tokens of the whole step.

        It is multiplied by the number of processes, because gradients and logged losses are averaged over them.
        """
        with self.compute_loss_context_manager():
            loss = self.losses(model, inputs.to(self.args.device))
        return loss * world_size() / num_items_in_batch

    def heldout_batches(self, rows: Sequence[TokenisedRow]) -> Iterator[Batch]:
        """This process's share of rows, in batches."""
        mine = [Example.from_row(rows[index]) for index in range(rank(), len(rows), world_size())]
        return self.losses.within(self.budget, mine, None)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the labelled tokens of the held-out rows, in nats. A signal interrupts it at once."""
        with self._patience(0):
            total = self._heldout_sums(self.eval_dataset if eval_dataset is None else eval_dataset)
        if world_size() > 1:
            total = self.accelerator.reduce(total.to(self.args.device).float(), "sum").double()  # pyright: ignore
        metrics = {f"{metric_key_prefix}_loss": float(total[0] / total[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _heldout_sums(self, rows: Any) -> torch.Tensor:
        """Summed loss over this process's share of the rows, and their number of labels: float64 [2]."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self.heldout_batches(rows):
            with uncompiled(), self.compute_loss_context_manager():
                loss = self.losses(model, batch.to(self.args.device))
            total += torch.tensor([float(loss), batch.num_labels], dtype=torch.float64)
        model.train(was_training)
        return total

    # The Trainer's hooks for saving and loading (seen with transformers 5.17 to 5.23).

    def _save_checkpoint(self, model: torch.nn.Module | None, trial: object) -> None:
        if self.saver is None:
            return
        rng = (generators() if self.loop.rng is None else self.loop.rng).to(self.args.device)
        rngs = [rng] if world_size() == 1 else list(self.accelerator.gather(rng[None]))  # pyright: ignore
        if self.is_world_process_zero():
            self.saver.write(self.trained(), self.state, [rng.cpu() for rng in rngs], self.watch, self.budget)
        self.accelerator.wait_for_everyone()

    def trained(self) -> Trained:
        """The objects whose state a checkpoint saves and restores."""
        assert self.model is not None and self.optimizer is not None and self.lr_scheduler is not None
        return Trained(self.model, self.optimizer, self.lr_scheduler, self.scaler)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler; None for precisions that need none."""
        return getattr(self.accelerator, "scaler", None)

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train to the end, from a checkpoint or from the first step.

        Raises:
            DivergedError: the loss diverged.
            MachineError: out of memory.
            UserError: the checkpoint's LoRA differs from the model's.
            Stopped: a signal arrived before this process had trained a step.
        """
        self.checkpoint = checkpoint
        if checkpoint is not None:
            self.watch = LossWatch.from_state(checkpoint.watched)
            self.budget = checkpoint.micro_batch(self.budget)
            if checkpoint.step >= self.total_steps:
                assert self.model is not None
                checkpoint.restore_weights(self.model)
                self.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
                return
        try:
            self.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        except Stopped:
            if self.stopping is None or self.state.global_step == (checkpoint.step if checkpoint else 0):
                raise
            self.stopping.reason = f"by {self.stopping.signals.received}"
            self._save_checkpoint(self.model, None)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the whole run."""
        training = self.recipe.training
        steps = -(-len(self.train_dataset) // training.batch_size)  # pyright: ignore[reportArgumentType]
        return training.max_steps or math.ceil(training.epochs * steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        assert self.checkpoint is not None and self.model is not None
        self.checkpoint.restore_weights(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.checkpoint is not None:
            self.checkpoint.restore_optimizer(self.trained())
            self.state.compute_steps(self.args, self.state.max_steps)  # the recipe decides when to log and evaluate

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing to do: `restore_optimizer` restores the scaler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.checkpoint is not None:
            self.checkpoint.restore_generators(rank())
            self._repeat_interrupted_evaluation()

    def _repeat_interrupted_evaluation(self) -> None:
        """Measure the held-out loss of the checkpoint's step if a signal interrupted that."""
        step, every = self.state.global_step, self.state.eval_steps
        due = self.args.eval_strategy == "steps" and step >= (self.args.eval_delay or 0) and step % every == 0
        known = self.saver is None or self.saver.metrics.has_heldout(step)
        if due and not known and self.eval_dataset:
            self.evaluate()
            if self.control.should_save:
                self._save_checkpoint(self.model, None)
