"""Finds a trained result by name: the files of base and adapter, and the prompt format.

The name is that of a run or its folder, the folder of any PEFT adapter, or an adapter's id on the hub.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huarizo.data.prompts import prompt_format
from huarizo.data.tokens import Encoder
from huarizo.errors import HubError, ModelError, RecipeError, UserError
from huarizo.hub.model_files import TEMPLATES, hostile
from huarizo.hub.names import check_pinned, resolve_adapter, resolve_model
from huarizo.model.adapter import CONFIG, WEIGHTS, check_adapter, tokenizer_beside
from huarizo.model.added_tokens import add_tokens
from huarizo.model.load import default_template, load_tokenizer, read_config
from huarizo.recipe import Recipe, make_recipe, with_overrides
from huarizo.runs import Run, find_run, open_run
from huarizo.sandbox.reading import read_json, read_text


@dataclass(frozen=True)
class Tuned:
    """The folders of base model and adapter, and the encoder with its prompt format.

    `recipe` is the run's. For an adapter from elsewhere it holds only base and prompt format, and `run` is None.
    """

    recipe: Recipe
    base: Path
    adapter: Path
    encoder: Encoder
    run: Run | None = None

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the prompt format's stop token and the tokenizer's end of sequence."""
        ids = (self.encoder.stop_id, self.encoder.tokenizer.eos_token_id)
        return [number for number in dict.fromkeys(ids) if number is not None]

    @property
    def folder(self) -> Path:
        """Where exports and evaluations go: the run's folder, or the current one for an adapter from elsewhere."""
        return self.run.path if self.run else Path()


READING = ("data.columns", "data.max_length", "data.on_bad_row")
"""Settings of a run that control how rows are read. They may be overridden for other rows."""


def read_otherwise(tuned: Tuned, overrides: Sequence[str]) -> Tuned:
    """The same result with other settings for reading rows: `key=value`, with keys from READING.

    Raises:
        RecipeError: another key, or an invalid value.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == each or key.startswith(f"{each}.") for each in READING):
            raise RecipeError(f"{override}: only {', '.join(READING)} can differ from the run")
    recipe = with_overrides(tuned.recipe, overrides)
    encoder = tuned.encoder
    longer = Encoder(encoder.tokenizer, encoder.prompt, recipe.data.labels, recipe.data.max_length)
    return dataclasses.replace(tuned, recipe=recipe, encoder=longer)


def find_tuned(name: str, prompt: str | None = None, base: str | None = None) -> Tuned:
    """Find a result by its name.

    name: a run, or the folder or hub id of a PEFT adapter.
    prompt: a prompt format to use instead of the run's. An adapter from elsewhere uses the chat template beside it,
        else its base's, else Alpaca's prompt.
    base: folder or hub id of the base model, if it has moved.

    Raises:
        UserError: nothing has that name, the run has no adapter yet, or its base is missing or has changed.
    """
    run = find_run(name)
    if run is not None:
        return open_tuned(run, prompt, base)
    local = Path(name).expanduser()
    if (local / CONFIG).is_file():
        folder = local.resolve()
        beside = find_run(folder.parent)
        if beside is not None and folder.name == beside.adapter.name:
            return open_tuned(beside, prompt, base)
        return open_adapter(folder, prompt, base)
    if local.exists() or "/" not in name or name.startswith((".", "/", "~")):
        return open_tuned(open_run(name), prompt, base)  # its error lists the runs that exist
    return open_adapter(resolve_adapter(name).path, prompt, base)


def open_tuned(run: Run, prompt: str | None = None, base: str | None = None) -> Tuned:
    """The parts of a finished run. Loads no weights.

    Raises:
        UserError: the run has no adapter yet, or its base model is missing or has changed.
    """
    if not (run.adapter / WEIGHTS).is_file():
        raise UserError(f"{run.path}: this run has no adapter yet. Resume it: huarizo resume {run.path}")
    recipe = run.recipe()
    recipe.model = base or recipe.model
    with _naming_its_place(run.recipe_file, "model", base):
        return dataclasses.replace(_with_base(recipe, run.adapter, prompt), run=run)


def open_adapter(folder: Path, prompt: str | None = None, base: str | None = None) -> Tuned:
    """The parts of a PEFT adapter, whatever tool made it.

    Raises:
        UserError: it is not a plain LoRA, does not name its base, or the base is missing.
    """
    config = check_adapter(folder)
    named = base or config.base_model_name_or_path
    if not named:
        raise UserError(
            f"{folder / CONFIG}: base_model_name_or_path is empty. Write the base model's hub id or folder there, or "
            "pass it as --base-model"
        )
    revision = f"@{config.revision}" if config.revision and not base and not Path(named).exists() else ""
    recipe = make_recipe(model=named + revision, data={"train": "quickstart"})
    with _naming_its_place(folder / CONFIG, "base_model_name_or_path", base):
        return _with_base(recipe, folder, prompt, _own_template(folder), foreign=True)


@contextmanager
def _naming_its_place(file: Path, field: str, base: str | None) -> Iterator[None]:
    """Add to the error for a missing base which file and field name it, unless the user passed the base."""
    try:
        yield
    except HubError as error:
        if base is not None:
            raise
        where = "If the base is elsewhere, pass --base-model FOLDER_OR_ID"
        raise HubError(f"{file}: {field}: {error}. {where}") from None


def _own_template(adapter: Path) -> str | None:
    """The chat template saved beside an adapter from elsewhere, in either of two files.

    Raises:
        ModelError: the file can't be read.
    """
    template, config = (adapter / name for name in TEMPLATES)
    if problem := hostile(adapter):
        raise ModelError(f"{adapter}: {problem}")
    try:
        if template.is_file():
            return read_text(template)
        found = read_json(config).get("chat_template") if config.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{adapter}: the tokenizer's settings can't be read ({error}). Repair or remove them"
        ) from None
    return default_template(found)


def _with_base(
    recipe: Recipe, adapter: Path, prompt: str | None, template: str | None = None, foreign: bool = False
) -> Tuned:
    source = resolve_model(recipe.model)
    check_pinned("model", [source], recipe.pinned.get("model", {}))
    tokenizer = load_tokenizer(source.path)
    if foreign:
        rows = read_config(source.path)["vocab_size"]
        tokenizer = tokenizer_beside(adapter, tokenizer, rows) or tokenizer
    add_tokens(tokenizer, recipe.data.special_tokens or [])
    tokenizer.chat_template = template or tokenizer.chat_template
    data = recipe.data
    format = prompt_format(prompt or data.prompt, tokenizer, data.eos, data.date, data.special_tokens or ())
    encoder = Encoder(tokenizer, format, data.labels, data.max_length)
    return Tuned(recipe, source.path, adapter, encoder)
