"""The supported architectures, by the `model_type` of config.json.

An architecture belongs here only if its packed training is known to equal Transformers' own, example by example.
"""

from pathlib import Path

from huarizo.errors import ModelError
from huarizo.model.architectures.architecture import Architecture
from huarizo.model.architectures.llama import LLAMA

ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Support models of an architecture. Transformers' Auto classes must know its `model_type`."""
    ARCHITECTURES[architecture.model_type] = architecture


def architecture_of(config: object, source: Path | str = "this model") -> Architecture:
    """The architecture of a model.

    config: the content of config.json, or Transformers' configuration; source: where it is from, for the message.

    Raises:
        ModelError: the architecture is not supported, or `config` is not a configuration.
    """
    is_json = isinstance(config, dict)
    found = config.get("model_type") if is_json else getattr(config, "model_type", type(config).__name__)
    if isinstance(found, str) and found in ARCHITECTURES:
        return ARCHITECTURES[found]
    names = config.get("architectures") if is_json else getattr(config, "architectures", None)
    supported = ", and ".join(architecture.described for architecture in ARCHITECTURES.values())
    raise ModelError(
        f"{source}: the architecture is {found!r} ({', '.join(map(str, names or ['no class named']))}). "
        f"Huarizo trains {supported}"
    )


def vocabulary_layers() -> tuple[set[str], set[str]]:
    """Last parts of the names of the embeddings and of the heads of all architectures: an adapter file doesn't say
    which architecture it is for."""
    names = [architecture.vocabulary_layers for architecture in ARCHITECTURES.values()]
    return {embedding for embedding, _ in names}, {head for _, head in names}


register(LLAMA)
