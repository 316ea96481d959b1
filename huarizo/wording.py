"""How messages quote what is the user's: names, texts, paths, lists of problems, and what a library said.

In go foreign texts and exceptions, out come words that any terminal can show and that stay short. Every part of the
package speaks through these functions, so that the same thing reads the same wherever it goes wrong.
"""

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")
"""A token as the hub makes them; no word that a path is made of is so long."""


def printable(text: str) -> str:
    """The text with everything escaped that a terminal can't show."""
    return text if text.isprintable() else repr(text)[1:-1]


def shown(path: Path) -> str:
    """A path as it can be printed anywhere."""
    return printable(str(path))


def excerpt(text: str, limit: int = 40) -> str:
    """A quoted text of the user's, cut to `limit` characters and printable."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def excerpt_of(value: Any) -> str:
    """A value as it can be quoted: short, and without a token."""
    text = TOKEN.sub("hf_***", repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def enumerated(names: Collection[str], limit: int = 20) -> str:
    """The first `limit` names, quoted, with commas between, and how many more there are."""
    quoted = [excerpt(name) for name in list(names)[:limit]]
    return (", ".join(quoted) or "none") + (f" and {len(names) - limit} more" if len(names) > limit else "")


def listed(problems: Sequence[str], limit: int = 20, count: int | None = None) -> str:
    """The first `limit` problems as an indented list, and how many more there are.

    count: of all problems, where only the first of them are at hand.
    """
    lines = [f"  - {problem}" for problem in problems[:limit]]
    more = (len(problems) if count is None else count) - len(lines)
    return "\n".join([*lines, f"  ... and {more} more"] if more > 0 else lines)


def did_you_mean(word: str, known: Iterable[str], written: Callable[[str], str] = excerpt) -> str:
    """`. Did you mean 'x'?` for the known word that is nearest to this one; "" where none is near.

    written: how a known word stands in the question.
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {written(near[0])}?" if near else ""


def first_line(error: BaseException) -> str:
    """What a library says, without the lines of advice behind it. All of it goes to the log, at level debug."""
    logger.debug("details", exc_info=error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what caused it, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
