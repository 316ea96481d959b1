"""The one typed description of a run, read from YAML with `key=value` overrides.

Every setting of Huarizo stands here with its type, range, default and a line of help, and all mistakes of a recipe
are reported at once, before anything loads. Nothing else in the package defines settings.
"""

import datetime
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from huarizo.errors import RecipeError
from huarizo.recipe_file import apply_override, read_yaml
from huarizo.wording import did_you_mean, listed

Precision = Literal["auto", "int8", "bf16", "fp16", "fp32"]
PROMPT_NAMES = ("auto", "chat", "alpaca", "stanford")
# TrainingArguments fields that the recipe, or Huarizo's own loop, already decides: field -> what to use instead.
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


TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")  # as the hub makes them; no word that a path is made of is so long


class Section(BaseModel):
    """A part of the recipe: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]


def names_of(value: object) -> list[str]:
    """The data sets that `data.train` or `data.eval` names; none where it is a share or a number of rows."""
    return [value] if isinstance(value, str) else list(value) if isinstance(value, list) else []


class DataRecipe(Section):
    """Which rows are trained on, and how they become tokens."""

    train: Name | Names = Field(
        default="quickstart",
        description="file, folder, hub data set id[@revision][:config][[split]], or quickstart; or a list of these",
    )
    eval: float | str | Names = Field(
        default=0.02,
        description="share held out (0.02), a number of rows (100), or other rows, named as for data.train; 0 = none",
    )
    prompt: str = Field(
        default="auto",
        description="alpaca | stanford | chat (the model's own template) | a Jinja template with {{ instruction }} and "
        "{{ input }}; auto = chat where the model has a template, alpaca otherwise",
    )
    labels: Literal["auto", "response", "all"] = Field(
        default="auto",
        description="which tokens are learnt: response, without turns of weight 0; all; auto = response, and all of a "
        "row that is a plain `text`, which is trained on as it is",
    )
    eos: bool = Field(
        default=True, description="end every response with the end-of-sequence token, so that the model stops"
    )
    max_length: int = Field(default=512, ge=8, le=1_000_000, description="tokens; a longer row is cut")
    date: str | None = Field(
        default=None,
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="day that a chat template is told which asks for it; null = the day of the first start, which the "
        "run keeps",
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail", description="skip writes the bad rows to a file of the run"
    )
    special_tokens: Names | None = Field(
        default=None,
        description="texts that become one token each, in prompts and answers, whose rows of embedding and head are "
        "trained: data.special_tokens=[<think>,</think>]",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="names in the file, where they differ: data.columns.instruction=question",
    )

    @field_validator("eval", mode="before")
    @classmethod
    def _eval_is_share_or_count(cls, value: Any) -> Any:
        if isinstance(value, bool) or value is None:
            raise ValueError("write a share (0.02), a number of rows (100), a file, or 0 for none")
        if isinstance(value, int | float) and (
            value < 0 or (value > 1 and value != int(value)) or value == float("inf")
        ):
            raise ValueError("a share lies between 0 and 1, a number of rows is whole")
        return value

    @field_validator("prompt")
    @classmethod
    def _prompt_is_known(cls, value: str) -> str:
        if value not in PROMPT_NAMES and "{{" not in value:
            hint = did_you_mean(value, PROMPT_NAMES)
            raise ValueError(
                f"not one of {', '.join(PROMPT_NAMES)}, nor a Jinja template with {{{{ instruction }}}}{hint}"
            )
        return value

    @field_validator("special_tokens")
    @classmethod
    def _tokens_are_texts(cls, value: list[str] | None) -> list[str] | None:
        odd = [text for text in value or [] if text != text.strip() or not text.isprintable()]
        if odd:
            raise ValueError(f"{odd[0]!r} begins or ends with a space, or holds what can't be seen")
        if len(set(value or [])) < len(value or []):
            raise ValueError("a text stands there twice")
        return value

    @field_validator("date")
    @classmethod
    def _date_is_a_day(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.date.fromisoformat(value)
        return value

    @model_validator(mode="after")
    def _chat_ends_its_turns(self) -> "DataRecipe":
        if not self.eos and self.prompt == "chat":
            raise ValueError("data.eos=false needs data.prompt alpaca or stanford: a chat template ends its own turns")
        return self


class LoraRecipe(Section):
    """The adapter (LoRA, arXiv 2106.09685)."""

    r: int = Field(default=8, ge=1, le=4096, description="rank")
    alpha: float = Field(default=16, gt=0, description="scale: the adapter's output is multiplied by alpha / r")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="share of the adapter's inputs dropped in training")
    target_modules: list[str] | Literal["all-linear"] = Field(
        default=["q_proj", "v_proj"], min_length=1, description="linear layers that get an adapter, or all-linear"
    )
    loraplus_lr_ratio: float | None = Field(
        default=None, ge=1, description="LoRA+ (arXiv 2402.12354): how many times larger B's learning rate is than A's"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="any other field of peft.LoraConfig, such as use_rslora or init_lora_weights"
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            return [name.strip() for name in value.split(",") if name.strip()]
        return value


class TrainingRecipe(Section):
    """How long, how fast, in which order. Counts are in optimizer steps."""

    epochs: float = Field(default=1, gt=0, description="passes over the rows")
    max_steps: int | None = Field(
        default=None, ge=1, description="stop after so many optimizer steps; null = by epochs"
    )
    batch_size: int = Field(default=4, ge=1, description="examples of one optimizer step, over all devices together")
    learning_rate: float = Field(default=2e-4, gt=0, lt=10, description="peak of the schedule")
    seed: int = Field(default=42, ge=0, lt=2**32, description="order of the rows, initial adapter, dropout")
    eval_every: int | None = Field(
        default=None, ge=1, description="held-out loss every so many steps; null = first and last"
    )
    save_minutes: float | None = Field(
        default=5, gt=0, description="checkpoint every so many minutes, at most 1% of the time; null = not by time"
    )
    save_every: int | None = Field(default=None, ge=1, description="checkpoint every so many steps as well")
    keep: int = Field(
        default=2, ge=1, le=1000, description="newest checkpoints to keep; the best by held-out loss stays too"
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="stop in time, with a checkpoint, where a session ends after so many minutes"
    )
    micro_batch_tokens: int | None = Field(
        default=None, ge=1, description="tokens computed at once; null = chosen for this machine. Changes no result"
    )
    compile: bool = Field(
        default=True, description="compile the decoder layers where a compiler is there: faster from the second step on"
    )


class Recipe(Section):
    """What is trained. The machine changes only how fast."""

    model: str = Field(
        default="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        min_length=1,
        description="hub id[@revision], local folder, or quickstart",
    )
    data: DataRecipe = Field(default_factory=DataRecipe)
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    precision: Precision = Field(default="auto", description="of the frozen base model; the adapter is always fp32")
    samples: Annotated[int, Field(ge=0, le=100)] | list[str] = Field(
        default=3, description="prompts answered before and after: so many held-out rows, or a list of prompts"
    )
    output: str | None = Field(default=None, description="run folder; null = runs/NAME-TIME, from the recipe's name")
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="any other field of transformers.TrainingArguments"
    )
    pinned: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="written by Huarizo: sha256 of each file used. Checked where present"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_token(cls, values: Any) -> Any:
        if TOKEN.search(repr(values)):
            raise ValueError("a recipe never holds a token of the hub: use HF_TOKEN or `hf auth login`, and revoke it")
        return values

    @field_validator("trainer")
    @classmethod
    def _trainer_fields_exist(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value:
            return value
        from transformers import TrainingArguments

        known = TrainingArguments.__dataclass_fields__
        kinds = get_type_hints(TrainingArguments)
        checked, problems = {}, []
        for name, given in value.items():
            if name in DECIDED_ELSEWHERE:
                problems.append(f"{name!r} is decided by the recipe; use {DECIDED_ELSEWHERE[name]}")
            elif name not in known:
                problems.append(f"{name!r} is not a field of TrainingArguments{did_you_mean(name, known)}")
            else:
                try:
                    checked[name] = _of_kind(kinds[name], given)
                except ValidationError as error:
                    problems.append(f"{name!r}: {error.errors()[-1]['msg']}, not {_shown(given)}")
        if problems:
            raise ValueError("; ".join(problems))
        return checked

    @field_validator("lora")
    @classmethod
    def _lora_options_exist(cls, value: LoraRecipe) -> LoraRecipe:
        if not value.options:
            return value
        from peft import LoraConfig

        imports = {"megatron_config", "megatron_core", "auto_mapping"} & value.options.keys()
        if imports:
            raise ValueError(f"options: {', '.join(sorted(imports))} would import other code; leave it out")
        taken = {"r": "lora.r", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout"}
        taken |= {"target_modules": "lora.target_modules"}
        for name in value.options:
            if name in taken:
                raise ValueError(f"options: {name!r} is set by `{taken[name]}`")
            if name not in LoraConfig.__dataclass_fields__:
                near = did_you_mean(name, LoraConfig.__dataclass_fields__)
                raise ValueError(f"options: {name!r} is not a field of LoraConfig{near}")
        return value


def _of_kind(kind: Any, value: Any) -> Any:
    """A value as a field of this type takes it: text becomes a number where one is wanted, and nothing else changes.

    Raises:
        ValidationError: it is of another type.
    """
    taken = TypeAdapter(kind).validate_python(value)
    return taken if isinstance(value, str) and isinstance(taken, int | float) else value


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides.

    Raises:
        RecipeError: with every mistake found in the file and the overrides, each with its dotted key.
    """
    path = Path(path)
    values = read_yaml(path)
    problems = [problem for override in overrides if (problem := apply_override(values, override))]
    return _validated(values, path.name, problems)


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with `key=value` overrides.

    Raises:
        RecipeError: as `load_recipe`.
    """
    values = recipe.model_dump()
    problems = [problem for override in overrides if (problem := apply_override(values, override))]
    return _validated(values, "overrides", problems)


def make_recipe(**values: Any) -> Recipe:
    """A recipe from Python: the same keys and checks as in a file.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return _validated(values, "recipe", [])


def _validated(values: dict[str, Any], name: str, problems: list[str]) -> Recipe:
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = problems + [_in_words(mistake) for mistake in error.errors()]
    else:
        if not problems:
            return recipe
    raise RecipeError(
        f"{name}: {len(problems)} mistake{'s' if len(problems) > 1 else ''}\n{listed(list(dict.fromkeys(problems)))}"
    )


def _in_words(mistake: Any) -> str:
    """One validation error as `key: what is wrong`, with a suggestion for an unknown key."""
    location = [str(part) for part in mistake["loc"]]
    known = [name for name, _ in fields()]
    key = ".".join(location)
    if mistake["type"] == "extra_forbidden":
        siblings = {name.split(".")[-1]: name for name in known}
        near = did_you_mean(key, known) or did_you_mean(location[-1], siblings, lambda leaf: repr(siblings[leaf]))
        return f"{key}: no such key{near or '. `huarizo recipe` lists them all'}"
    while key not in known and "." in key:  # a branch of a union, or an item of a list
        key = key.rpartition(".")[0]
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return message if message.startswith("data.") or not key else f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, not {_shown(mistake['input'])}"


def _shown(value: Any) -> str:
    text = TOKEN.sub("hf_***", repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field), in the order of the recipe."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def type_of(field: FieldInfo) -> str:
    """A field's type and range in words: `integer, 1 to 4096`."""
    return _type_in_words(field.annotation) + "".join(_range_in_words(m) for m in field.metadata)


def _type_in_words(kind: Any) -> str:
    words = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    if kind in words:
        return words[kind]
    arguments = get_args(kind)
    origin = getattr(kind, "__origin__", None)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (list, dict):
        return "list of text" if origin is list else "mapping"
    return " or ".join(_type_in_words(argument) for argument in arguments if not isinstance(argument, FieldInfo))


def _range_in_words(limit: Any) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return "".join(f", {sign} {getattr(limit, name)}" for name, sign in signs.items() if hasattr(limit, name))


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
