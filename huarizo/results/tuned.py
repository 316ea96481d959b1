"""What a run's result is made of: the base's files, the adapter's, and the prompts that they speak through."""

from dataclasses import dataclass
from pathlib import Path

from huarizo.data.prompts import prompt_format
from huarizo.data.tokens import Encoder
from huarizo.errors import UserError
from huarizo.hub.names import check_pinned, resolve_model
from huarizo.model.load import load_tokenizer
from huarizo.recipe import Recipe
from huarizo.runs import Run


@dataclass(frozen=True)
class Tuned:
    """Folders of the base model and of the adapter, and the encoder of the run's prompt format."""

    recipe: Recipe
    base: Path
    adapter: Path
    encoder: Encoder

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which an answer ends: the prompt format's, and the tokenizer's end of sequence."""
        ids = (self.encoder.stop_id, self.encoder.tokenizer.eos_token_id)
        return [number for number in dict.fromkeys(ids) if number is not None]


def open_tuned(run: Run) -> Tuned:
    """The parts of a finished run; nothing heavy is loaded.

    Raises:
        UserError: the run has no adapter yet, or its base model can't be found or is no longer the one it was.
    """
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{run.path}: this run has no adapter yet. Go on with it: huarizo resume {run.path}")
    recipe = run.recipe()
    source = resolve_model(recipe.model)
    check_pinned("model", source, recipe.pinned.get("model", {}))
    tokenizer = load_tokenizer(source.path)
    encoder = Encoder(tokenizer, prompt_format(recipe.data.prompt, tokenizer, recipe.data.eos))
    return Tuned(recipe, source.path, run.adapter, encoder)
