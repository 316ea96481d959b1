"""The typed description of a run, read from YAML with `key=value` overrides.

Every setting of Huarizo is defined here, with its type, range, default and a line of help, and nowhere else. All
mistakes in a recipe are reported at once, before anything loads.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from huarizo.errors import RecipeError
from huarizo.recipe_file import apply_override, read_yaml
from huarizo.recipe_help import fields, mistake_in_words
from huarizo.trainer_fields import check_trainer_fields
from huarizo.wording import TOKEN, did_you_mean, listed

Precision = Literal["auto", "int8", "bf16", "fp16", "fp32"]
PROMPT_NAMES = ("auto", "chat", "alpaca", "stanford")


class Section(BaseModel):
    """A part of the recipe. Unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]


def names_of(value: object) -> list[str]:
    """The data sets that `data.train` or `data.eval` names; [] for a share or a number of rows."""
    return [value] if isinstance(value, str) else list(value) if isinstance(value, list) else []


class DataRecipe(Section):
    """Which rows are trained on, and how they become tokens."""

    train: Name | Names = Field(
        default="quickstart",
        description="file, folder, hub data set id[@revision][:config][[split]], or quickstart; or a list of these",
    )
    eval: float | str | Names = Field(
        default=0.02,
        description="held-out rows: a share (0.02), a number (100), or other rows, named as in data.train; 0 = none",
    )
    prompt: str = Field(
        default="auto",
        description="alpaca | stanford | chat (the model's own template) | a Jinja template with {{ instruction }} and "
        "{{ input }}; auto = chat if the model has a template, otherwise alpaca",
    )
    labels: Literal["auto", "response", "all"] = Field(
        default="auto",
        description="tokens to learn: response (without turns of weight 0) or all (the prompt too); auto = response, "
        "and all of a plain `text` row",
    )
    eos: bool = Field(
        default=True, description="end every response with the end-of-sequence token, so that the model learns to stop"
    )
    max_length: int = Field(default=512, ge=8, le=1_000_000, description="longest row in tokens; longer rows are cut")
    date: str | None = Field(
        default=None,
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="date for chat templates that ask for one (YYYY-MM-DD); null = the day the run first started",
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail", description="skip leaves bad rows out and writes them to a file in the run folder"
    )
    special_tokens: Names | None = Field(
        default=None,
        description="texts that become one token each, in prompts and answers; their rows of embedding and head are "
        "trained: data.special_tokens=[<think>,</think>]",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="column names in the file, if they differ: data.columns.instruction=question",
    )

    @field_validator("eval", mode="before")
    @classmethod
    def _eval_is_share_or_count(cls, value: object) -> object:
        if isinstance(value, bool) or value is None:
            raise ValueError("write a share (0.02), a number of rows (100), a file, or 0 for none")
        if isinstance(value, int | float) and (
            value < 0 or (value > 1 and value != int(value)) or value == float("inf")
        ):
            raise ValueError("a share lies between 0 and 1, and a number of rows is a whole number")
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
            raise ValueError(f"{odd[0]!r} begins or ends with a space, or has characters that can't be printed")
        if len(set(value or [])) < len(value or []):
            raise ValueError("a text is listed twice")
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

    r: int = Field(default=8, ge=1, le=4096, description="rank of the adapter")
    alpha: float = Field(default=16, gt=0, description="scale: the output of the adapter is multiplied by alpha / r")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="dropout on the input of the adapter during training")
    target_modules: list[str] | Literal["all-linear"] = Field(
        default=["q_proj", "v_proj"],
        min_length=1,
        description="names of the linear layers that get an adapter, or all-linear",
    )
    loraplus_lr_ratio: float | None = Field(
        default=None, ge=1, description="LoRA+ (arXiv 2402.12354): learning rate of B divided by that of A"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="any other field of peft.LoraConfig, such as use_rslora or init_lora_weights"
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        if isinstance(value, str) and value != "all-linear":
            return [name.strip() for name in value.split(",") if name.strip()]
        return value


class TrainingRecipe(Section):
    """How long, how fast, in which order. Counts are in optimizer steps."""

    epochs: float = Field(default=1, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(
        default=None, ge=1, description="number of optimizer steps; null = given by training.epochs"
    )
    batch_size: int = Field(default=4, ge=1, description="examples per optimizer step, over all devices together")
    learning_rate: float = Field(default=2e-4, gt=0, lt=10, description="peak learning rate of the schedule")
    seed: int = Field(default=42, ge=0, lt=2**32, description="seed for row order, initial adapter and dropout")
    eval_every: int | None = Field(
        default=None, ge=1, description="steps between measurements of the held-out loss; null = only at start and end"
    )
    save_minutes: float | None = Field(
        default=5,
        gt=0,
        description="minutes between checkpoints, which take at most 1% of the time; null = not by time",
    )
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints, in addition to save_minutes"
    )
    keep: int = Field(
        default=2,
        ge=1,
        le=1000,
        description="number of newest checkpoints to keep; the best by held-out loss is kept too",
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="stop within this many minutes, with a checkpoint; for sessions of limited time"
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens computed at once; null = chosen for this machine. The result stays the same",
    )
    compile: bool = Field(
        default=True, description="compile the decoder layers if there is a compiler: faster from the second step on"
    )


class Recipe(Section):
    """What is trained. The machine changes only the speed."""

    model: str = Field(
        default="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        min_length=1,
        description="hub id[@revision], local folder, or quickstart",
    )
    data: DataRecipe = Field(default_factory=DataRecipe)
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    precision: Precision = Field(
        default="auto", description="precision of the frozen base model; the adapter is always fp32"
    )
    samples: Annotated[int, Field(ge=0, le=100)] | list[str] = Field(
        default=3,
        description="prompts answered before and after training: a number of held-out rows, or a list of prompts",
    )
    output: str | None = Field(default=None, description="run folder; null = runs/NAME-TIME, with the recipe's name")
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="any other field of transformers.TrainingArguments"
    )
    pinned: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="written by Huarizo: sha256 of each file used; checked if present"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_token(cls, values: object) -> object:
        if TOKEN.search(repr(values)):
            raise ValueError("a recipe never holds a hub token: use HF_TOKEN or `hf auth login`, and revoke this token")
        return values

    @field_validator("trainer")
    @classmethod
    def _trainer_fields_exist(cls, value: dict[str, object]) -> dict[str, object]:
        return check_trainer_fields(value) if value else value

    @field_validator("lora")
    @classmethod
    def _lora_options_exist(cls, value: LoraRecipe) -> LoraRecipe:
        if not value.options:
            return value
        from peft import LoraConfig

        imports = {"megatron_config", "megatron_core", "auto_mapping"} & value.options.keys()
        if imports:
            raise ValueError(f"options: {', '.join(sorted(imports))} would import other code; leave it out")
        settings = {"r": "lora.r", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout"}
        settings |= {"target_modules": "lora.target_modules"}
        for name in value.options:
            if name in settings:
                raise ValueError(f"options: {name!r} is set by `{settings[name]}`")
            if name not in LoraConfig.__dataclass_fields__:
                near = did_you_mean(name, LoraConfig.__dataclass_fields__)
                raise ValueError(f"options: {name!r} is not a field of LoraConfig{near}")
        return value


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides.

    Raises:
        RecipeError: there are mistakes; the message lists all in the file and the overrides, each with its dotted key.
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


def make_recipe(**values: object) -> Recipe:
    """Make a recipe in Python, with the same keys and checks as in a file.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return _validated(values, "recipe", [])


def _validated(values: dict[str, object], name: str, problems: list[str]) -> Recipe:
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        known = [name for name, _ in fields(Recipe)]
        problems = problems + [mistake_in_words(mistake, known) for mistake in error.errors()]
    else:
        if not problems:
            return recipe
    raise RecipeError(
        f"{name}: {len(problems)} mistake{'s' if len(problems) > 1 else ''}\n{listed(list(dict.fromkeys(problems)))}"
    )


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every default, which `load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
