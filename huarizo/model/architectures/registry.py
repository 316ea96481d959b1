"""The architectures that are trained, by the `model_type` of config.json.

Only those stand here whose packed training is known to equal Transformers' own, example by example.
"""

from pathlib import Path
from typing import Any

from huarizo.errors import ModelError
from huarizo.model.architectures.architecture import Architecture
from huarizo.model.architectures.llama import LLAMA

ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Take models of an architecture. Transformers' Auto classes have to know its `model_type`."""
    ARCHITECTURES[architecture.model_type] = architecture


def architecture_of(config: Any, source: Path | str = "this model") -> Architecture:
    """The architecture of a model.

    config: what config.json holds, or Transformers' object of it; source: where it is from, for the message.

    Raises:
        ModelError: it is none that is trained, or `config` is no configuration at all.
    """
    is_json = isinstance(config, dict)
    found = config.get("model_type") if is_json else getattr(config, "model_type", type(config).__name__)
    if isinstance(found, str) and found in ARCHITECTURES:
        return ARCHITECTURES[found]
    names = config.get("architectures") if is_json else getattr(config, "architectures", None)
    taken = ", and ".join(architecture.described for architecture in ARCHITECTURES.values())
    raise ModelError(
        f"{source}: the architecture is {found!r} ({', '.join(map(str, names or ['no class named']))}). "
        f"Huarizo trains {taken}"
    )


def vocabulary_layers() -> tuple[set[str], set[str]]:
    """Last parts of the names of embeddings, and of heads, in any architecture: an adapter's file does not say which
    it is of."""
    names = [architecture.vocabulary_layers for architecture in ARCHITECTURES.values()]
    return {embedding for embedding, _ in names}, {head for _, head in names}


register(LLAMA)
