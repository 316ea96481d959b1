"""Reads a recipe file and `key=value` overrides into plain nested values, without validating them.

The YAML is safe YAML with stricter rules: no duplicate keys, no tags, no aliases that expand beyond a limit.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from huarizo.errors import RecipeError
from huarizo.sandbox.reading import read_text

MAX_BYTES = 100_000  # a recipe with every setting has about 5,000
MAX_VALUES = 20_000  # with aliases expanded


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, and reads 2e-4 as a number, as YAML 1.2 does."""


def _mapping_without_doubles(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is a list or mapping", key_node.start_mark)
        key = key_node.value
        if key in seen and key != "<<":
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    """A string, with JSON's surrogate pairs such as \\ud83d\\ude00 joined into one character."""
    text = loader.construct_scalar(node)
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


_RecipeLoader.add_constructor("tag:yaml.org,2002:str", _text)
_RecipeLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_doubles)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse YAML by the recipe's stricter rules. Raises `yaml.YAMLError`."""
    loader = _RecipeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values with its aliases expanded")
        return loader.construct_document(node)
    except (ValueError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(str(error) or type(error).__name__) from None
    finally:
        loader.dispose()


def _unfolded(node: yaml.Node, known: dict[int, float]) -> float:
    """Number of values in a node with every alias expanded; infinite if one contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        children: list[yaml.Node | tuple[yaml.Node, yaml.Node]] = node.value if isinstance(node.value, list) else []
        pairs = [child if isinstance(child, tuple) else (child,) for child in children]
        known[id(node)] = 1 + sum(_unfolded(inner, known) for pair in pairs for inner in pair)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a recipe file, {} if it is empty.

    Raises:
        RecipeError: the file is missing, can't be read, or holds no mapping.
    """
    try:
        values = parse_yaml(read_text(path, MAX_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        there = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        known = f" The recipes here are {', '.join(there)}." if there else ""
        raise RecipeError(f"{path}: there is no such recipe file.{known}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (OSError, ValueError) as error:
        cause = (isinstance(error, OSError) and error.strerror) or error
        raise RecipeError(f"{path}: can't be read as a recipe in UTF-8: {cause}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not a {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> str | None:
    """Set one `key=value` in the nested mapping. Returns what is wrong with it, or None."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return f"{override!r}: an override is written key=value, such as lora.r=16"
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        if text.lstrip().startswith(("[", "{")):
            return f"{override!r}: not valid YAML; quote strings that contain punctuation, such as ['Who are you?']"
        value = text
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            return f"{key}: {part!r} is a single value and has no keys inside"
    section[parts[-1]] = value
    return None
