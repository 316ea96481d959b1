"""The text of a recipe, and `key=value` overrides, become plain nested values, not yet judged.

Safe YAML with stricter rules: no key twice, no tags, no aliases that unfold into more than a recipe can be.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from huarizo.errors import RecipeError

MAX_BYTES = 100_000  # a recipe of every setting has 5,000
MAX_VALUES = 20_000  # with aliases unfolded


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is a mistake, and 2e-4 is a number as in YAML 1.2."""


def _mapping_without_doubles(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is a list or mapping", key_node.start_mark)
        key = key_node.value
        if key in seen and key != "<<":
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    """A text in which JSON's escapes of one character in two halves, \\ud83d\\ude00, are that character."""
    text = loader.construct_scalar(node)
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


_RecipeLoader.add_constructor("tag:yaml.org,2002:str", _text)
_RecipeLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_doubles)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Safe YAML with the recipe's stricter rules. Raises `yaml.YAMLError`."""
    loader = _RecipeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values with its aliases unfolded")
        return loader.construct_document(node)
    except (ValueError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(str(error) or type(error).__name__) from None
    finally:
        loader.dispose()


def _unfolded(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node holds when each alias stands for a copy; infinite where one holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        children: list[Any] = node.value if isinstance(node.value, list) else []
        pairs = [child if isinstance(child, tuple) else (child,) for child in children]
        known[id(node)] = 1 + sum(_unfolded(inner, known) for pair in pairs for inner in pair)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a recipe file.

    Raises:
        RecipeError: there is none, it can't be read, or it is no mapping.
    """
    if not path.is_file():
        there = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        known = f" The recipes here are {', '.join(there)}." if there else ""
        raise RecipeError(f"{path}: there is no such recipe file.{known}")
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: {path.stat().st_size:,} bytes are no recipe; is this the data file?")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (UnicodeDecodeError, OSError, RecursionError) as error:
        raise RecipeError(f"{path}: can't be read as a UTF-8 text file: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not a {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> str | None:
    """Set one `key=value` in the nested mapping; returns what is wrong with it, or None."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return f"{override!r}: an override is written key=value, such as lora.r=16"
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        if text.lstrip().startswith(("[", "{")):
            return f"{override!r}: not valid YAML; put texts with punctuation in quotes, such as ['Who are you?']"
        value = text
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            return f"{key}: {part!r} is a single value and has no keys inside"
    section[parts[-1]] = value
    return None
