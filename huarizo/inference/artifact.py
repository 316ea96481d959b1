"""What a result is made of: the base's files, the adapter's, and the prompts that they speak through.

A result is named by a run folder or its name, by the folder of any PEFT adapter, or by an adapter's id on the hub.
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
    """Folders of the base model and of the adapter, and the encoder of the prompt format.

    `recipe` is the run's; of a foreign adapter it says the base and the prompt format alone. `run` is None there.
    """

    recipe: Recipe
    base: Path
    adapter: Path
    encoder: Encoder
    run: Run | None = None

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which an answer ends: the prompt format's, and the tokenizer's end of sequence."""
        ids = (self.encoder.stop_id, self.encoder.tokenizer.eos_token_id)
        return [number for number in dict.fromkeys(ids) if number is not None]

    @property
    def folder(self) -> Path:
        """Where what is made from it goes: the run's folder; the current one for an adapter from elsewhere."""
        return self.run.path if self.run else Path()


READING = ("data.columns", "data.max_length", "data.on_bad_row")
"""Settings of a run that say how other rows are read, and may be others for them."""


def read_otherwise(tuned: Tuned, overrides: Sequence[str]) -> Tuned:
    """The same result, for rows that are read with other settings: `key=value`, of the keys in READING.

    Raises:
        RecipeError: another key, or a value that it can't have.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == each or key.startswith(f"{each}.") for each in READING):
            raise RecipeError(f"{override}: only {', '.join(READING)} can be other than in the run")
    recipe = with_overrides(tuned.recipe, overrides)
    encoder = tuned.encoder
    longer = Encoder(encoder.tokenizer, encoder.prompt, recipe.data.labels, recipe.data.max_length)
    return dataclasses.replace(tuned, recipe=recipe, encoder=longer)


def find_tuned(name: str, prompt: str | None = None, base: str | None = None) -> Tuned:
    """A result by its name.

    name: a run, or the folder or hub id of a PEFT adapter.
    prompt: the prompt format, where it is not the run's; an adapter from elsewhere is taken to use the chat template
        beside it, or that of its base, or Alpaca's prompt where there is none.
    base: folder or hub id of the base model, where it is no longer where the result says.

    Raises:
        UserError: nothing of that name, no adapter yet, or its base can't be found or is no longer the one it was.
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
        return open_tuned(open_run(name), prompt, base)  # says what there is
    return open_adapter(resolve_adapter(name).path, prompt, base)


def open_tuned(run: Run, prompt: str | None = None, base: str | None = None) -> Tuned:
    """The parts of a finished run; nothing heavy is loaded.

    Raises:
        UserError: the run has no adapter yet, or its base model can't be found or is no longer the one it was.
    """
    if not (run.adapter / WEIGHTS).is_file():
        raise UserError(f"{run.path}: this run has no adapter yet. Go on with it: huarizo resume {run.path}")
    recipe = run.recipe()
    recipe.model = base or recipe.model
    with _naming_its_place(run.recipe_file, "model", base):
        return dataclasses.replace(_with_base(recipe, run.adapter, prompt), run=run)


def open_adapter(folder: Path, prompt: str | None = None, base: str | None = None) -> Tuned:
    """The parts of a PEFT adapter that some other tool may have made.

    Raises:
        UserError: it is no plain LoRA, does not name its base, or that can't be found.
    """
    config = check_adapter(folder)
    named = base or config.base_model_name_or_path
    if not named:
        raise UserError(
            f"{folder / CONFIG}: base_model_name_or_path is empty. Write the base model's hub id or folder there, or "
            "give it as --base-model"
        )
    revision = f"@{config.revision}" if config.revision and not base and not Path(named).exists() else ""
    recipe = make_recipe(model=named + revision, data={"train": "quickstart"})
    with _naming_its_place(folder / CONFIG, "base_model_name_or_path", base):
        return _with_base(recipe, folder, prompt, _own_template(folder), foreign=True)


@contextmanager
def _naming_its_place(file: Path, field: str, base: str | None) -> Iterator[None]:
    """Around the search for a base: where it fails, the error names the file and field that name the base.

    base: as the user named it; its error stays as it is.
    """
    try:
        yield
    except HubError as error:
        if base is not None:
            raise
        where = "Where the base is elsewhere, give --base-model FOLDER_OR_ID"
        raise HubError(f"{file}: {field}: {error}. {where}") from None


def _own_template(adapter: Path) -> str | None:
    """The chat template that a foreign adapter brings along, in the one file or the other.

    Raises:
        ModelError: it can't be read.
    """
    template, config = (adapter / name for name in TEMPLATES)
    if problem := hostile(adapter):
        raise ModelError(f"{adapter}: {problem}")
    try:
        if template.is_file():
            return read_text(template)
        found = read_json(config).get("chat_template") if config.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{adapter}: the tokenizer's settings can't be read ({error}). Mend or remove them") from None
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
