"""Describes a recipe's settings, their types and ranges, and the mistakes in a recipe.

It turns pydantic's models, fields and validation errors into what `huarizo recipe` prints and a RecipeError lists. No
setting is defined here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from huarizo.wording import did_you_mean, excerpt_of


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field), in the order in which they are defined."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def type_of(field: FieldInfo) -> str:
    """A field's type and range as text: `integer, >= 1, <= 4096`."""
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


def _range_in_words(limit: object) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return "".join(f", {sign} {getattr(limit, name)}" for name, sign in signs.items() if hasattr(limit, name))


def mistake_in_words(mistake: Mapping[str, Any], known: Sequence[str]) -> str:
    """One validation error as `key: what is wrong`, with a suggestion for an unknown key.

    known: all dotted keys.
    """
    location = [str(part) for part in mistake["loc"]]
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
    return f"{key}: {message[0].lower()}{message[1:]}, not {excerpt_of(mistake['input'])}"
