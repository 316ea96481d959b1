"""Prompts from every kind of file, and answers side by side in which no text becomes markup."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from huarizo.data.prompts import OpenExchange
from huarizo.errors import DataError, UserError
from huarizo.inference.generate import Sampling, open_assistant, stream_answer
from huarizo.inference.samples import Sample, samples_as_text, samples_from_text
from huarizo.recipe import DataRecipe
from huarizo.results.compare import compare, read_prompts, usual_prompts, write_comparison
from huarizo.runs import Run
from tests.results.make import make_tuned

HOSTILE = Sample(
    "<script>alert(1)</script>", "", "```\n# no heading\n```", "</td><b>bold</b> | & 안녕", "expected\n````"
)


def test_prompts_come_from_lines_or_rows(tmp_path: Path, alpaca_file: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeffWho are you?\n\n  안녕?  \r\n", encoding="utf-8")
    assert [sample.prompt for sample in read_prompts(text, DataRecipe())] == ["Who are you?", "안녕?"]
    rows = read_prompts(alpaca_file, DataRecipe())
    assert len(rows) == 12 and rows[2].prompt == "Count to 3" and rows[2].expected == "1 2 3"
    (tmp_path / "own.jsonl").write_text('{"question": "Who?", "reply": "Me."}\n')
    columns = {"instruction": "question", "output": "reply"}
    (own,) = read_prompts(tmp_path / "own.jsonl", DataRecipe(columns=columns))
    assert (own.prompt, own.expected) == ("Who?", "Me.")


def test_rows_need_no_answer_to_be_asked(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    (folder / "a.csv").write_text("instruction,system\nWho?,Be rude.\nWhy?,\n")
    (folder / "more" / "b.csv").write_text("instruction,input,system\nAdd,1 + 1,\n")
    found = read_prompts(folder, DataRecipe())
    assert [(sample.prompt, sample.system) for sample in found] == [
        ("Who?", "Be rude."),
        ("Why?", ""),
        ("Add\n\n1 + 1", ""),
    ]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?", "system": "Be kind."}\n{"prompt": "Why?"}\n')
    found = read_prompts(tmp_path / "prompts.jsonl", DataRecipe())
    assert [(sample.prompt, sample.system, sample.expected) for sample in found] == [
        ("Who?", "Be kind.", ""),
        ("Why?", "", ""),
    ]


def test_what_compare_wrote_can_be_asked_again(tmp_path: Path) -> None:
    for expected in ("", "Me."):
        sample = Sample("Who?", "of you", "a", "b", expected)
        write_comparison([sample], "run", tmp_path / "out.jsonl", force=True)
        (found,) = read_prompts(tmp_path / "out.jsonl", DataRecipe())
        assert found.prompt == "Who?\n\nof you"


def test_bad_rows_of_prompts_are_left_out_on_request(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": 7}\n')
    with pytest.raises(DataError, match="row 2"):
        read_prompts(tmp_path / "prompts.jsonl", DataRecipe())
    assert len(read_prompts(tmp_path / "prompts.jsonl", DataRecipe(on_bad_row="skip"))) == 1


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"\n \n", "no prompt"), (b"\xff\xfe\x00", "not UTF-8")]
)
def test_a_file_that_can_not_be_asked_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(file, DataRecipe())


def test_base_and_tuned_answer_the_runs_own_prompts(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    assert len(usual_prompts(tuned)) == 8
    run = dataclasses.replace(tuned, run=Run(tmp_path))
    (tmp_path / "samples.jsonl").write_text(samples_as_text([Sample("Hi", "", "a", "b", "c")]))
    (found,) = compare(open_assistant(run, "fp32"), usual_prompts(run), 12)
    assert found.prompt == "Hi" and found.expected == "c" and found.before != found.after
    for wrong in ("{}\n", "7\n", '{"instruction": "Hi", "input": "", "before": "", "after": 3, "expected": ""}\n'):
        (tmp_path / "samples.jsonl").write_text(wrong)
        with pytest.raises(UserError, match="samples.jsonl"):
            usual_prompts(run)


def test_a_prompt_is_answered_under_its_system_text(tmp_path: Path) -> None:
    assistant = open_assistant(make_tuned(tmp_path), "fp32")
    asked = [Sample("Hi", "", "", None), Sample("Hi", "", "", None, system="Be rude.")]
    plain, spoken = compare(assistant, asked, 12)
    alone = stream_answer(assistant, [OpenExchange("Hi")], lambda _: None, "Be rude.", Sampling(12))
    assert spoken.after == alone.text != plain.after and spoken.before != plain.before
    (read,) = samples_from_text(samples_as_text([spoken]))
    assert read == spoken


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


@pytest.mark.parametrize("name", ["prompts", "prompts.txt", "prompts.md", "prompts.jsonl", "prompts.parquet"])
def test_prompts_in_a_pipe_or_a_device_are_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: .*is a pipe"):
        read_prompts(tmp_path / name, DataRecipe())
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{name}: .*device"):
        read_prompts(tmp_path / name, DataRecipe())


def test_so_many_prompts_are_no_list(tmp_path: Path) -> None:
    with (tmp_path / "prompts.txt").open("wb") as file:
        file.truncate(10**10)  # sparse
    with pytest.raises(DataError, match="10,000,000,000 bytes are too many"):
        read_prompts(tmp_path / "prompts.txt", DataRecipe())
