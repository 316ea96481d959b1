"""Prompts from every kind of file, and answers side by side in which no text becomes markup."""

import json
from pathlib import Path

import pytest

from huarizo.errors import DataError, UserError
from huarizo.results.compare import compare, read_prompts, usual_prompts, write_comparison
from huarizo.results.generate import open_assistant
from huarizo.results.report import Sample, samples_as_text
from huarizo.runs import Run
from tests.results.make import make_tuned

HOSTILE = Sample(
    "<script>alert(1)</script>", "", "```\n# no heading\n```", "</td><b>bold</b> | & 안녕", "expected\n````"
)


def test_prompts_come_from_lines_or_rows(tmp_path: Path, alpaca_file: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeffWho are you?\n\n  안녕?  \r\n", encoding="utf-8")
    assert [sample.prompt for sample in read_prompts(text)] == ["Who are you?", "안녕?"]
    rows = read_prompts(alpaca_file)
    assert len(rows) == 12 and rows[2].prompt == "Count to 3" and rows[2].expected == "1 2 3"
    (tmp_path / "own.jsonl").write_text('{"question": "Who?", "reply": "Me."}\n')
    (own,) = read_prompts(tmp_path / "own.jsonl", {"instruction": "question", "output": "reply"})
    assert (own.prompt, own.expected) == ("Who?", "Me.")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"\n \n", "no prompt"), (b"\xff\xfe\x00", "not UTF-8")]
)
def test_a_file_that_can_not_be_asked_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(file)


def test_base_and_tuned_answer_the_runs_own_prompts(tmp_path: Path) -> None:
    import dataclasses

    tuned = make_tuned(tmp_path)
    assert len(usual_prompts(tuned)) == 8
    run = dataclasses.replace(tuned, run=Run(tmp_path))
    (tmp_path / "samples.jsonl").write_text(samples_as_text([Sample("Hi", "", "a", "b", "c")]))
    (found,) = compare(open_assistant(run, "fp32"), usual_prompts(run), 12)
    assert found.prompt == "Hi" and found.expected == "c" and found.before != found.after
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="samples.jsonl"):
        usual_prompts(run)


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    for ending in (".md", ".html", ".jsonl"):
        write_comparison([HOSTILE], "run <1>", tmp_path / "new" / f"out{ending}")
    page = (tmp_path / "new" / "out.html").read_text()
    assert "<script>" not in page and "<b>" not in page and "run &lt;1&gt;" in page and "http" not in page
    markdown = (tmp_path / "new" / "out.md").read_text().splitlines()
    fences = [line for line in markdown if line.endswith("text") and line.startswith("`")]
    assert fences == ["```text", "````text", "```text", "`````text"]
    (row,) = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert row == {
        "prompt": HOSTILE.prompt,
        "base": HOSTILE.before,
        "tuned": HOSTILE.after,
        "expected": HOSTILE.expected,
    }


def test_nothing_is_overwritten_and_other_endings_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "out.md"
    target.write_text("mine")
    with pytest.raises(UserError, match="--force"):
        write_comparison([HOSTILE], "run", target)
    assert target.read_text() == "mine"
    write_comparison([HOSTILE], "run", target, force=True)
    with pytest.raises(UserError, match=r"\.md, \.html, \.jsonl"):
        write_comparison([HOSTILE], "run", tmp_path / "out.pdf")
