"""Jinja templates, compiled and rendered: a model's chat template, and a prompt template of a recipe.

A chat template finds what Transformers gives it (`render_jinja_template`): the sandbox that changes nothing,
`generation` blocks, loop controls, `tojson`, `raise_exception`, `strftime_now`; a test compares the two.
"""

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from huarizo.sandbox.child import RefusedError


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant says, and writes it as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body).set_lineno(line)]


class _Dict:
    """`dict` for templates, without a class to reach through."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates, without names that Python itself uses."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportSelfClsParameterName]
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"chat templates can't keep {name!r}, a name that begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@functools.lru_cache(maxsize=16)
def _chat_template(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


@functools.lru_cache(maxsize=16)
def _prompt_template(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template)


def _rendered(compiled: Callable[[str], Template], template: str, variables: dict[str, Any]) -> str:
    try:
        return compiled(template).render(variables)
    except TemplateError as error:
        raise RefusedError(str(error)) from None


def chat(template: str, **variables: Any) -> str:
    """A chat template's text for `messages` and whatever else it is given."""
    return _rendered(_chat_template, template, variables)


def prompt(template: str, **variables: Any) -> str:
    """A recipe's template with `instruction` and `input`."""
    return _rendered(_prompt_template, template, variables)


JOBS = {"chat": chat, "prompt": prompt}
