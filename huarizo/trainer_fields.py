"""Checks the recipe's `trainer:` section, the fields of transformers.TrainingArguments, without a model or data.

Returns the values in the fields' types, or raises one ValueError with every mistake. A field that the recipe or
Huarizo's own loop already decides is a mistake too, and the message says what to use instead.
"""

from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from huarizo.wording import did_you_mean, excerpt_of

DECIDED_ELSEWHERE = {
    "output_dir": "use `output`",
    "num_train_epochs": "use `training.epochs`",
    "max_steps": "use `training.max_steps`",
    "per_device_train_batch_size": "use `training.batch_size`, which counts the examples of an optimizer step",
    "gradient_accumulation_steps": "use `training.batch_size`; micro-batches are cut by `training.micro_batch_tokens`",
    "auto_find_batch_size": "use `training.micro_batch_tokens`",
    "per_device_eval_batch_size": "use `training.micro_batch_tokens`",
    "learning_rate": "use `training.learning_rate`",
    "seed": "use `training.seed`",
    "data_seed": "use `training.seed`",
    "eval_strategy": "use `training.eval_every`",
    "eval_steps": "use `training.eval_every`",
    "eval_on_start": "the held-out loss is always measured first",
    "do_train": "`huarizo train` trains",
    "do_eval": "use `data.eval`",
    "save_strategy": "use `training.save_every` and `training.save_minutes`",
    "save_total_limit": "use `training.keep`",
    "save_only_model": "a checkpoint holds all that the next step depends on",
    "logging_nan_inf_filter": "losses that are not finite are always shown",
    "save_steps": "use `training.save_every`",
    "resume_from_checkpoint": "use `huarizo resume RUN`",
    "load_best_model_at_end": "checkpoints stay in the run folder",
    "bf16": "use `precision`",
    "fp16": "use `precision`",
    "train_sampling_strategy": "the order of the rows comes from `training.seed`",
    "dataloader_drop_last": "every row is trained on",
    "remove_unused_columns": "batches are packed",
    "label_smoothing_factor": "the loss is the cross-entropy at labelled positions",
    "push_to_hub": "a run stays on this machine",
    "hub_token": "use HF_TOKEN or `hf auth login`; a recipe never holds a hub token",
    "disable_tqdm": "Huarizo shows its own progress",
    "torch_compile": "use `training.compile`",
    "torch_compile_backend": "use `training.compile`",
    "torch_compile_mode": "use `training.compile`",
    "use_cpu": "a GPU is used if there is one, unless CUDA_VISIBLE_DEVICES is empty",
    "bf16_full_eval": "use `precision`",
    "fp16_full_eval": "use `precision`",
    "average_tokens_across_devices": "the loss is the mean over all labelled tokens of a step",
    "include_num_input_tokens_seen": "tokens are always counted",
    "ignore_data_skip": "a resumed run continues with the next row",
    "metric_for_best_model": "the best checkpoint is the one with the lowest held-out loss",
    "greater_is_better": "the best checkpoint is the one with the lowest held-out loss",
    "local_rank": "torchrun sets it",
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel_config"),
        "logits are computed at labelled positions only, in chunks, which makes Liger's loss unnecessary",
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config"),
        "use torchrun, with the frozen model on each GPU; `precision: int8` halves its memory",
    ),
    **dict.fromkeys(
        (
            *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
            *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
            *("label_names", "length_column_name"),
        ),
        "tokenised rows are read from a memory-mapped file and packed without workers",
    ),
    **dict.fromkeys(
        (
            *("do_predict", "prediction_loss_only", "eval_delay", "eval_do_concat_batches", "eval_use_gather_object"),
            *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
        ),
        "training measures only the held-out loss; `huarizo eval RUN` does the rest",
    ),
    **dict.fromkeys(
        ("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "use `huarizo push RUN`",
    ),
    **dict.fromkeys(
        ("save_on_each_node", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
        "Huarizo writes its own checkpoints",
    ),
    "use_cache": "training doesn't use it",
}
"""Field -> what to use instead, or why there is nothing to set."""


def check_trainer_fields(values: Mapping[str, object]) -> dict[str, object]:
    """Check the values and convert them to the fields' types.

    Raises:
        ValueError: a field does not exist, is decided elsewhere, or has another type.
    """
    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    kinds = get_type_hints(TrainingArguments)
    checked, problems = {}, []
    for name, given in values.items():
        if name in DECIDED_ELSEWHERE:
            problems.append(f"{name!r} can't be set here: {DECIDED_ELSEWHERE[name]}")
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


def _of_kind(kind: Any, value: object) -> object:
    """Convert a value for a field of this type: text becomes a number if the field is one; nothing else changes.

    Raises:
        ValidationError: the value is of another type.
    """
    converted = TypeAdapter(kind).validate_python(value)
    return converted if isinstance(value, str) and isinstance(converted, int | float) else value
