"""Compiles and renders Jinja templates: a model's chat template, and a recipe's prompt template.

Chat templates get the environment that Transformers gives them (`render_jinja_template`): the immutable sandbox,
`generation` blocks, loop controls, `tojson`, `raise_exception`, `strftime_now`. A test compares the two.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from huarizo.sandbox.child import RefusedError


class _Generation(Extension):
    """The `{% generation %}` block: marks what the assistant writes, and leaves the text as it is.

    blocks: the text written so far. spans: (begin, end) of each such block, in characters.
    """

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.blocks: list[str] = []
        self.spans: list[tuple[int, int]] = []

    def render(self, template: Template, variables: dict[str, object]) -> str:
        self.blocks, self.spans = [], []
        for block in template.generate(variables):
            self.blocks.append(block)
        return "".join(self.blocks)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)]

    def _marked(self, caller: Callable[[], str]) -> str:
        start, text = sum(map(len, self.blocks)), caller()
        self.spans.append((start, start + len(text)))
        return text


class _Dict:
    """`dict` for templates, without giving them the class itself."""

    def __call__(self, *args: Any, **kwargs: object) -> Mapping[Any, object]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> Mapping[Any, object]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportSelfClsParameterName]
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"chat templates can't keep {name!r}, a name that begins with an underscore")


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _chat_template(template: str) -> tuple[Template, _Generation]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    generation = environment.extensions[_Generation.identifier]
    assert isinstance(generation, _Generation)
    return environment.from_string(template), generation


@functools.lru_cache(maxsize=16)
def _prompt_template(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise RefusedError(str(error)) from None


def chat(template: str, date: str | None, **variables: object) -> tuple[str, list[tuple[int, int]] | None]:
    """A chat template's text for `messages` and its other variables, and the spans of its `generation` blocks.

    Spans are (begin, end) in characters; None if the template has no such blocks.
    date: the day that `strftime_now` gives, YYYY-MM-DD; None for the present moment.
    """
    now = datetime.fromisoformat(date) if date else datetime.now()
    with _refusals():
        compiled, generation = _chat_template(template)
        text = generation.render(compiled, variables | {"strftime_now": now.strftime})
    return text, generation.spans if "endgeneration" in template else None


def prompt(template: str, **variables: object) -> str:
    """A recipe's template with `instruction` and `input`."""
    with _refusals():
        return _prompt_template(template).render(variables)


JOBS = {"chat": chat, "prompt": prompt}
