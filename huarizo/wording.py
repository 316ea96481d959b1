"""Formats what messages quote: names, texts, paths, lists of problems, and errors of libraries.

Texts and exceptions from outside become short texts that any terminal can show. The whole package uses these functions,
so that the same problem reads the same everywhere.
"""

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")
"""A token of the hub. It is longer than any word of a usual path."""


def printable(text: str) -> str:
    """The text, with what a terminal can't show escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def shown(path: Path) -> str:
    """A path that any terminal can show."""
    return printable(str(path))


def excerpt(text: str, limit: int = 40) -> str:
    """The text quoted, printable and cut to `limit` characters."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def excerpt_of(value: object) -> str:
    """A value for a message: short, and with tokens masked."""
    text = TOKEN.sub("hf_***", repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def enumerated(names: Collection[str], limit: int = 20) -> str:
    """The first `limit` names, quoted and separated by commas, and the number of the rest."""
    quoted = [excerpt(name) for name in list(names)[:limit]]
    return (", ".join(quoted) or "none") + (f" and {len(names) - limit} more" if len(names) > limit else "")


def listed(problems: Sequence[str], limit: int = 20, count: int | None = None) -> str:
    """The first `limit` problems as an indented list, and the number of the rest.

    count: of all problems, if `problems` has only the first of them.
    """
    lines = [f"  - {problem}" for problem in problems[:limit]]
    more = (len(problems) if count is None else count) - len(lines)
    return "\n".join([*lines, f"  ... and {more} more"] if more > 0 else lines)


def did_you_mean(word: str, known: Iterable[str], written: Callable[[str], str] = excerpt) -> str:
    """`. Did you mean 'x'?` for the known word closest to this one; "" if none is close.

    written: formats the known word.
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {written(near[0])}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, without the advice below it. The whole error is logged at level debug."""
    logger.debug("details", exc_info=error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
