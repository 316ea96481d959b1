"""Answers the same prompts with the base and the tuned model, side by side.

The prompts come from a file or from the run's own samples. The result is a table, Markdown, an HTML page, or JSON.
"""

import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from huarizo.data.formats import QUESTIONS
from huarizo.data.rows import read_rows, require_good
from huarizo.errors import DataError, UserError
from huarizo.files import make_parent, write_whole
from huarizo.inference.artifact import Tuned
from huarizo.inference.generate import Assistant, answers
from huarizo.inference.samples import Sample, samples_from_text, samples_of
from huarizo.recipe import DataRecipe
from huarizo.results.overwrite import check_file
from huarizo.results.report import fenced
from huarizo.results.verify import PROMPTS
from huarizo.sandbox.reading import read_text

LARGEST = 10_000_000  # bytes of a file of prompts
STYLE = """\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { border: 1px solid #8885; padding: .6rem .8rem; text-align: left; vertical-align: top; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def read_prompts(file: Path, data: DataRecipe) -> list[Sample]:
    """Read prompts from a text file, one a line, or from a file or folder of rows, with or without answers.

    data: gives the column names of the rows, and whether bad rows are skipped.

    Raises:
        DataError: no such file, or no prompt in it.
    """
    if not file.exists():
        raise DataError(f"{file}: no such file. Pass a text file with one prompt a line, or a file of rows")
    if file.is_dir() or file.suffix.lower() not in (".txt", ".md", ""):
        return list(samples_of(require_good(read_rows(file, data.columns, QUESTIONS), data.on_bad_row)))
    try:
        lines = read_text(file, LARGEST).splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8. Save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        said = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"{file}: can't be read: {said}. Write the prompts to a text file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{file}: no prompt in it. Write one a line")
    return [Sample(prompt, "", "", None) for prompt in prompts]


def usual_prompts(tuned: Tuned) -> list[Sample]:
    """The run's own samples, or a few general prompts if it has none."""
    if tuned.run and tuned.run.samples.is_file():
        try:
            samples = samples_from_text(tuned.run.samples.read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{tuned.run.samples}: can't be read. Pass a file of prompts") from None
        if samples:
            return samples
    return [Sample(prompt, "", "", None) for prompt in PROMPTS]


def compare(
    assistant: Assistant, prompts: Sequence[Sample], max_new_tokens: int = 200, console: Console | None = None
) -> list[Sample]:
    """The prompts with greedy answers of the base (`before`) and of the tuned model (`after`).

    console: a terminal to show progress on.

    Raises:
        MachineError: not enough memory even for one prompt.
    """
    questions = [sample.question for sample in prompts]
    with assistant.untuned():
        before = answers(assistant, questions, max_new_tokens, console=console)
    after = answers(assistant, questions, max_new_tokens, console=console)
    return [
        dataclasses.replace(sample, before=old.text, after=new.text)
        for sample, old, new in zip(prompts, before, after, strict=True)
    ]


def write_comparison(samples: Sequence[Sample], title: str, target: Path, force: bool = False) -> None:
    """Write Markdown (.md), a self-contained HTML page (.html), or JSON lines (.jsonl).

    Raises:
        UserError: another suffix, or `target` exists and `force` is not set.
        MachineError: the disk is full or can't be written.
    """
    check_target(target, force)
    make_parent(target)
    write_whole(target, WRITERS[target.suffix](samples, title))


def check_target(target: Path, force: bool) -> None:
    """Check that a comparison can be written there, before the answers are generated.

    Raises:
        UserError: a suffix that is not in `WRITERS`, or `target` exists and `force` is not set.
    """
    if target.suffix not in WRITERS:
        raise UserError(f"{target}: the suffix must be one of {', '.join(WRITERS)}")
    check_file(target, force)


def as_markdown(samples: Sequence[Sample], title: str) -> str:
    """One section a prompt. Every text is in a code block, so that it can't become markup."""
    parts = [f"# {title}\n"]
    for number, sample in enumerate(samples, 1):
        parts.append(f"\n## {number}\n")
        for name, text in _columns(sample):
            parts.append(f"\n**{name}**\n\n{fenced(text)}\n")
    return "".join(parts)


def as_html(samples: Sequence[Sample], title: str) -> str:
    """A page with a table. It loads nothing from elsewhere, and every text is escaped."""
    expected = any(sample.expected for sample in samples)
    heads = ["prompt", "base", "tuned", *(["expected"] if expected else [])]
    rows = []
    for sample in samples:
        cells = [sample.prompt, sample.before, sample.after or "", *([sample.expected] if expected else [])]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    name = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>\n{STYLE}</style>'
        f"</head>\n<body><h1>{name}</h1>\n<table><thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table></body></html>\n"
    )


def as_json_lines(samples: Sequence[Sample], title: str) -> str:
    """One object a prompt: prompt, base, tuned, and expected if known."""
    return "".join(json.dumps(dict(_columns(sample)), ensure_ascii=False) + "\n" for sample in samples)


def _columns(sample: Sample) -> list[tuple[str, str]]:
    columns = [("prompt", sample.prompt), ("base", sample.before), ("tuned", sample.after or "")]
    return [*columns, ("expected", sample.expected)] if sample.expected else columns


WRITERS = {".md": as_markdown, ".html": as_html, ".jsonl": as_json_lines}
