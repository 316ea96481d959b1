"""The recipe's `trainer:`, as far as it can be judged by itself: fields of transformers.TrainingArguments.

In go field names and values, out come the values in the fields' types, or one ValueError with every mistake. A field
that the recipe, or Huarizo's own loop, already decides is a mistake too, and the message says what to use instead.
"""

from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from huarizo.wording import did_you_mean, excerpt_of

DECIDED_ELSEWHERE = {
    "output_dir": "`output`",
    "num_train_epochs": "`training.epochs`",
    "max_steps": "`training.max_steps`",
    "per_device_train_batch_size": "`training.batch_size`, which counts the examples of an optimizer step",
    "gradient_accumulation_steps": "`training.batch_size`; micro-batches are cut by `training.micro_batch_tokens`",
    "auto_find_batch_size": "`training.micro_batch_tokens`",
    "per_device_eval_batch_size": "`training.micro_batch_tokens`",
    "learning_rate": "`training.learning_rate`",
    "seed": "`training.seed`",
    "data_seed": "`training.seed`",
    "eval_strategy": "`training.eval_every`",
    "eval_steps": "`training.eval_every`",
    "eval_on_start": "nothing: the held-out loss is always measured first",
    "do_train": "nothing: `huarizo train` trains",
    "do_eval": "`data.eval`",
    "save_strategy": "`training.save_every` and `training.save_minutes`",
    "save_total_limit": "`training.keep`",
    "save_only_model": "nothing: a checkpoint holds all that the next step depends on",
    "logging_nan_inf_filter": "nothing: what is not a number is shown",
    "save_steps": "`training.save_every`",
    "resume_from_checkpoint": "`huarizo resume RUN`",
    "load_best_model_at_end": "nothing: checkpoints stay in the run folder",
    "bf16": "`precision`",
    "fp16": "`precision`",
    "train_sampling_strategy": "nothing: the order of the rows comes from `training.seed`",
    "dataloader_drop_last": "nothing: every row is trained on",
    "remove_unused_columns": "nothing: batches are packed",
    "label_smoothing_factor": "nothing: the loss is the cross-entropy at labelled positions",
    "push_to_hub": "nothing: a run stays on this machine",
    "hub_token": "HF_TOKEN or `hf auth login`; a recipe never holds a token",
    "disable_tqdm": "nothing: Huarizo shows its own progress",
    "torch_compile": "`training.compile`",
    "torch_compile_backend": "`training.compile`",
    "torch_compile_mode": "`training.compile`",
    "use_cpu": "nothing: a card is used where there is one, unless CUDA_VISIBLE_DEVICES is empty",
    "bf16_full_eval": "`precision`",
    "fp16_full_eval": "`precision`",
    "average_tokens_across_devices": "nothing: the loss is the mean over all labelled tokens of a step",
    "include_num_input_tokens_seen": "nothing: tokens are always counted",
    "ignore_data_skip": "nothing: a run goes on with the row after its last one",
    "metric_for_best_model": "nothing: the held-out loss tells which checkpoint is the best",
    "greater_is_better": "nothing: the held-out loss tells which checkpoint is the best",
    "local_rank": "nothing: torchrun sets it",
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel_config"),
        "nothing: logits are made at labelled positions only, in chunks, which is what Liger's loss is for",
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config"),
        "torchrun, where each card holds the frozen model; `precision: int8` halves it",
    ),
    **dict.fromkeys(
        (
            *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
            *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
            *("label_names", "length_column_name"),
        ),
        "nothing: tokenised rows are read from a file in memory, and packed, without workers",
    ),
    **dict.fromkeys(
        (
            *("do_predict", "prediction_loss_only", "eval_delay", "eval_do_concat_batches", "eval_use_gather_object"),
            *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
        ),
        "nothing: the held-out loss is all that is measured; `huarizo eval RUN` does the rest",
    ),
    **dict.fromkeys(
        ("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), "`huarizo push RUN`"
    ),
    **dict.fromkeys(
        ("save_on_each_node", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
        "nothing: Huarizo writes its own checkpoints",
    ),
    "use_cache": "nothing: training has no use for it",
}
"""Field -> what to use instead."""


def check_trainer_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the fields take them.

    Raises:
        ValueError: a field that does not exist, is decided elsewhere, or has another type.
    """
    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    kinds = get_type_hints(TrainingArguments)
    checked, problems = {}, []
    for name, given in values.items():
        if name in DECIDED_ELSEWHERE:
            problems.append(f"{name!r} is decided by the recipe; use {DECIDED_ELSEWHERE[name]}")
        elif name not in known:
            problems.append(f"{name!r} is not a field of TrainingArguments{did_you_mean(name, known)}")
        else:
            try:
                checked[name] = _of_kind(kinds[name], given)
            except ValidationError as error:
                problems.append(f"{name!r}: {error.errors()[-1]['msg']}, not {excerpt_of(given)}")
    if problems:
        raise ValueError("; ".join(problems))
    return checked


def _of_kind(kind: Any, value: Any) -> Any:
    """A value as a field of this type takes it: text becomes a number where one is wanted, and nothing else changes.

    Raises:
        ValidationError: it is of another type.
    """
    taken = TypeAdapter(kind).validate_python(value)
    return taken if isinstance(value, str) and isinstance(taken, int | float) else value
