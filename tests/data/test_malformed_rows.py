"""Each kind of bad row has its message: file, row, field, what is wrong and how to mend it."""

from pathlib import Path

import pytest

from huarizo.data.rows import read_rows, require_good
from huarizo.errors import DataError

GOOD = '{"instruction": "Q", "output": "A"}'
SHORT = {
    "<U>": '{"role": "user", "content": "Q"}',
    "<A>": '{"role": "assistant", "content": "A"}',
    "<S>": '{"role": "system", "content": "S"}',
    "<ROLES>": "Write one of system, user, assistant, tool, or a usual other name of these.",
    "<LIST>": 'Write a list of {"role": ..., "content": ...} objects, the user first, the assistant last.',
}


def long(text: str) -> str:
    for short, meant in SHORT.items():
        text = text.replace(short, meant)
    return text


def complaint(path: Path, content: str | bytes) -> str:
    """The message about a file of this content, with the path cut to its name."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        require_good(read_rows(path), "fail")
    return str(caught.value).replace(f"{path.parent}/", "")


# Name, the second of three rows, the message after "a.json, row 2".
ROWS = [
    ("no output", '{"instruction": "Q"}', ", field 'output': is missing. Add it, or delete the row."),
    ("no instruction", '{"output": "A"}', ", field 'instruction': is missing. Add it, or delete the row."),
    (
        "null output",
        '{"instruction": "Q", "output": null}',
        ", field 'output': is null. Write a text, or delete the row.",
    ),
    ("number", '{"instruction": "Q", "output": 3}', ", field 'output': is a number (3). Write it as a string: \"3\"."),
    (
        "fraction",
        '{"instruction": 0.5, "output": "A"}',
        ", field 'instruction': is a number (0.5). Write it as a string: \"0.5\".",
    ),
    (
        "truth",
        '{"instruction": true, "output": "A"}',
        ", field 'instruction': is true. Write it as a string: \"true\".",
    ),
    ("nan", '{"instruction": "Q", "output": NaN}', ", field 'output': is NaN. Write a text, or delete the row."),
    (
        "infinity",
        '{"instruction": "Q", "output": -Infinity}',
        ", field 'output': is infinite, or too large a number. Write a text, or delete the row.",
    ),
    (
        "huge int",
        '{"instruction": "Q", "output": 1' + "0" * 5000 + "}",
        ", field 'output': is infinite, or too large a number. Write a text, or delete the row.",
    ),
    (
        "list",
        '{"instruction": ["Q"], "output": "A"}',
        ", field 'instruction': is a list of 1. Write its text as one string.",
    ),
    (
        "object",
        '{"instruction": "Q", "output": {"text": "A", "lang": "en"}}',
        ", field 'output': is an object ('text', 'lang'). Write its text as one string.",
    ),
    (
        "empty object",
        '{"instruction": "Q", "output": {}}',
        ", field 'output': is an empty object. Write its text as one string.",
    ),
    (
        "empty",
        '{"instruction": "", "output": "A"}',
        ", field 'instruction': is empty. Write a text, or delete the row.",
    ),
    (
        "white",
        '{"instruction": "Q", "output": " \\n\\t"}',
        ", field 'output': is empty (only white space). Write a text, or delete the row.",
    ),
    (
        "wide white",
        '{"instruction": "\\u3000", "output": "A"}',
        ", field 'instruction': is empty (only white space). Write a text, or delete the row.",
    ),
    (
        "input number",
        '{"instruction": "Q", "input": 7, "output": "A"}',
        ", field 'input': is a number (7). Write it as a string: \"7\".",
    ),
    (
        "input nan",
        '{"instruction": "Q", "input": NaN, "output": "A"}',
        ", field 'input': is NaN. Write a text, or \"\" for none.",
    ),
    (
        "system list",
        '{"instruction": "Q", "output": "A", "system": []}',
        ", field 'system': is a list of 0. Write its text as one string.",
    ),
    (
        "twice",
        '{"instruction": "Q", "output": "A", "output": "B"}',
        ", field 'output': stands 2 times in one object. Keep one of them.",
    ),
    (
        "surrogate",
        '{"instruction": "ab\\ud83d", "output": "A"}',
        ", field 'instruction': has half a character (\\ud83d) at character 3. Write both halves, or delete it.",
    ),
    (
        "nul",
        '{"instruction": "Q", "output": "a\\u0000b"}',
        ", field 'output': has a NUL character (\\u0000) at character 2. Delete it from the text.",
    ),
    (
        "string row",
        '"Q"',
        ': is a text (\'Q\'), not an object. Write an object: {"instruction": "...", "output": "..."}.',
    ),
    (
        "list row",
        '["Q", "A"]',
        ': is a list of 2, not an object. Write an object: {"instruction": "...", "output": "..."}.',
    ),
    ("null row", "null", ': is null, not an object. Write an object: {"instruction": "...", "output": "..."}.'),
    ("number row", "5", ': is a number (5), not an object. Write an object: {"instruction": "...", "output": "..."}.'),
    (
        "history text",
        '{"instruction": "Q", "output": "A", "history": "before"}',
        ", field 'history': is a text ('before'), not a list. Write a list of pairs: [[\"instruction\", \"output\"]].",
    ),
    (
        "history single",
        '{"instruction": "Q", "output": "A", "history": [["q"]]}',
        ", field 'history[0]': is a list of 1, not a pair. Write it as [instruction, output].",
    ),
    (
        "history null",
        '{"instruction": "Q", "output": "A", "history": [["q", null]]}',
        ", field 'history[0][1]': is null. Write a text, or delete the row.",
    ),
    (
        "history flat",
        '{"instruction": "Q", "output": "A", "history": ["q", "a"]}',
        ", field 'history[0]': is a text ('q'), not a pair. Write it as [instruction, output].",
    ),
]


@pytest.mark.parametrize(("bad", "expected"), [pytest.param(*case, id=name) for name, *case in ROWS])
def test_alpaca_row(tmp_path: Path, bad: str, expected: str) -> None:
    message = complaint(tmp_path / "a.json", f"[{GOOD}, {bad}, {GOOD}]")
    assert message.startswith("1 of 3 rows can't be used:\n")
    assert f"\n  - a.json, row 2{expected}\n" in message
    assert message.endswith("Mend them in the file, or leave them out: data.on_bad_row=skip")


# Name, the messages of the second row, the message after "a.json, row 2, field 'messages".
TURNS = [
    ("turns null", "null", "': is null, not a list. <LIST>"),
    ("turns text", '"Q"', "': is a text ('Q'), not a list. <LIST>"),
    ("turns object", "<U>", "': is an object ('role', 'content'), not a list. <LIST>"),
    ("turns empty", "[]", "': is an empty list. <LIST>"),
    ("turn text", '["Q", <A>]', '[0]\': is a text (\'Q\'), not an object. Write it as {"role": ..., "content": ...}.'),
    ("turn null", "[<U>, null]", '[1]\': is null, not an object. Write it as {"role": ..., "content": ...}.'),
    ("no role", '[{"content": "Q"}, <A>]', "[0].role': is missing. <ROLES>"),
    ("no content", '[<U>, {"role": "assistant"}]', "[1].content': is missing. Add it, or delete the row."),
    (
        "null content",
        '[<U>, {"role": "assistant", "content": null}]',
        "[1].content': is null. Write a text, or delete the row.",
    ),
    (
        "content parts",
        '[{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": {}}]}, <A>]',
        "[0].content[1]': is a part of the type 'image_url', not text. Only text can be trained on: write it as text, "
        "or delete the row.",
    ),
    (
        "empty content",
        '[<U>, {"role": "assistant", "content": ""}]',
        "[1].content': is empty. Write a text, or delete the row.",
    ),
    (
        "unknown role",
        '[{"role": "narrator", "content": "Q"}, <A>]',
        "[0].role': is a text ('narrator'), not a known role. <ROLES>",
    ),
    (
        "number role",
        '[{"role": 1, "content": "Q"}, <A>]',
        "[0].role': is a number (1), not a known role. <ROLES>",
    ),
    (
        "no answer",
        "[<S>, <U>, <U>]",
        "[1]': is a user turn without an answer. Add the assistant's answer, or delete this turn.",
    ),
    (
        "late system",
        "[<U>, <A>, <S>, <U>, <A>]",
        "[2]': is a system turn that is not the first turn. Move it to the front, or delete it.",
    ),
    (
        "two weights",
        '[<U>, <A>, {"role": "assistant", "content": "A", "weight": 0}]',
        "[2]': is a second assistant turn in a row, with another weight than the first. Give both the same weight.",
    ),
    (
        "half a weight",
        '[<U>, {"role": "assistant", "content": "A", "weight": 0.5}]',
        "[1].weight': is a number (0.5). Write 1 for a turn that is learnt, or 0 for one that is only read.",
    ),
    (
        "train maybe",
        '[<U>, {"role": "assistant", "content": "A", "train": "maybe"}]',
        "[1].train': is a text ('maybe'). Write 1 for a turn that is learnt, or 0 for one that is only read.",
    ),
    (
        "tool first",
        '[{"role": "tool", "content": "Q"}, <A>]',
        "[0]': is a tool's turn without a call in front of it. Put the assistant's tool_calls before it.",
    ),
    (
        "no result",
        '[<U>, {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f"}}]}, <A>]',
        "[2]': follows a tool call without its result. Put the tool's turn between them.",
    ),
    (
        "calls text",
        '[<U>, {"role": "assistant", "tool_calls": "f"}, <A>]',
        "[1].tool_calls': is a text ('f'), not a list. Write [{\"function\": {...}}].",
    ),
    (
        "arguments",
        '[<U>, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}, <A>]',
        '[1].tool_calls[0]\': has arguments that are no JSON object. Write them as {"name": value}.',
    ),
    (
        "call",
        '[<U>, {"role": "function_call", "content": "f(x)"}, <A>]',
        '[1].content\': is no tool call. Write it as {"name": "...", "arguments": {...}}.',
    ),
    ("only system", "[<S>]", "[0]': is a system turn and the only one. Add a user turn and its answer."),
    (
        "turn twice",
        '[{"role": "user", "role": "user", "content": "Q"}, <A>]',
        "[0].role': stands 2 times in one object. Keep one of them.",
    ),
]


@pytest.mark.parametrize(("bad", "expected"), [pytest.param(*case, id=name) for name, *case in TURNS])
def test_turns(tmp_path: Path, bad: str, expected: str) -> None:
    good = long('{"messages": [<U>, <A>]}')
    message = complaint(tmp_path / "a.json", f'[{good}, {{"messages": {long(bad)}}}]')
    assert f"\n  - a.json, row 2, field 'messages{long(expected)}\n" in message


# Name, a file of two rows the second of which is bad, the message.
OTHER_FORMATS = [
    ("turns missing", '[{"messages": [<U>, <A>]}, {"id": 1}]', "a.json, row 2, field 'messages': is missing. <LIST>"),
    (
        "tools",
        '[{"messages": [<U>, <A>]}, {"messages": [<U>, <A>], "tools": [{"type": "function"}]}]',
        "a.json, row 2, field 'tools[0]': describes no tool. Write it as "
        '{"type": "function", "function": {"name": "...", ...}}.',
    ),
    (
        "two systems",
        '[{"messages": [<U>, <A>]}, {"messages": [<S>, <U>, <A>], "system": "other"}]',
        "a.json, row 2, field 'system': differs from the system turn. Keep one of the two.",
    ),
    (
        "gpt first",
        '[{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, '
        '{"conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]}]',
        "a.json, row 2, field 'conversations[1]': is a user turn without an answer. Add the assistant's answer, or "
        "delete this turn.",
    ),
    (
        "share role",
        '[{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, '
        '{"conversations": [{"from": "narrator", "value": "A"}]}]',
        "a.json, row 2, field 'conversations[0].from': is a text ('narrator'), not a known role. <ROLES>",
    ),
    (
        "share value",
        '[{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, '
        '{"conversations": [{"from": "human", "text": "A"}]}]',
        "a.json, row 2, field 'conversations[0].value': is missing. Add it, or delete the row.",
    ),
    (
        "completion null",
        '[{"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": null}]',
        "a.json, row 2, field 'completion': is null. Write a text, or delete the row.",
    ),
    (
        "completion text",
        '[{"prompt": "Q", "completion": "A"}, {"prompt": [<U>], "completion": "A"}]',
        "a.json, row 2, field 'completion': is a text ('A'), not a list. <LIST>",
    ),
    (
        "completion user",
        '[{"prompt": "Q", "completion": "A"}, {"prompt": [<U>], "completion": [<U>]}]',
        "a.json, row 2, field 'prompt[0]': is a user turn without an answer. Add the assistant's answer, or delete "
        "this turn.",
    ),
]


@pytest.mark.parametrize(("content", "expected"), [pytest.param(*case, id=name) for name, *case in OTHER_FORMATS])
def test_other_formats(tmp_path: Path, content: str, expected: str) -> None:
    assert f"\n  - {long(expected)}\n" in complaint(tmp_path / "a.json", long(content))


# Name, what follows a good first line, the message after "a.jsonl".
LINES = [
    (
        "line not json",
        'Q and A\n{"instruction": "Q", "output": "A"}\n',
        ", row 2: is not JSON: expecting value, column 1, near 'Q and A\\n'. Write each row as one JSON object "
        "on one line.",
    ),
    (
        "line comma",
        '{"instruction": "Q", "output": "A"},\n',
        ', row 2: is not JSON: extra data, column 36, near \' "Q", "output": "A"},\\n\'. Write each row as one '
        "JSON object on one line.",
    ),
    (
        "line quotes",
        "{'instruction': 'Q'}\n",
        ", row 2: is not JSON: expecting property name enclosed in double quotes, column 2, near "
        "\"{'instruction': 'Q'}\\n\". Put names between double quotes, and no comma after the last one.",
    ),
    (
        "line tab",
        '{"instruction": "a\tb", "output": "A"}\n',
        ', row 2: is not JSON: invalid control character, column 19, near \'{"instruction": "a\\tb", "output": '
        '"A"}\\n\'. Write line breaks and tabs inside texts as \\n and \\t.',
    ),
    (
        "line escape",
        '{"instruction": "a\\x", "output": "A"}\n',
        ', row 2: is not JSON: invalid \\escape, column 19, near \'{"instruction": "a\\\\x", "output": '
        '"A"}\\n\'. Write a backslash inside a text as \\\\.',
    ),
    (
        "line cut",
        '{"instruction": "Q", "outp',
        ", row 2: ends in the middle of a JSON value, at column 26, the end of the file. The download may be "
        "incomplete: fetch it again, or delete this line.",
    ),
    (
        "line cut word",
        '{"instruction": "Q", "output": nul',
        ", row 2: ends in the middle of a JSON value, at column 34, the end of the file. The download may be "
        "incomplete: fetch it again, or delete this line.",
    ),
    (
        "line scalar",
        "\n17\n",
        ', row 3: is a number (17), not an object. Write an object: {"instruction": "...", "output": "..."}.',
    ),
    ("line deep", "[" * 100_000 + "\n", ", row 2: is nested too deeply. Write a flat object, or delete the line."),
    (
        "line null",
        '\r\n{"instruction": "Q", "output": null}\r\n',
        ", row 3, field 'output': is null. Write a text, or delete the row.",
    ),
]


@pytest.mark.parametrize(("bad", "expected"), [pytest.param(*case, id=name) for name, *case in LINES])
def test_lines(tmp_path: Path, bad: str, expected: str) -> None:
    assert f"\n  - a.jsonl{expected}\n" in complaint(tmp_path / "a.jsonl", f"{GOOD}\n{bad}")


QUOTING = 'Put cells with line breaks or quotation marks between quotation marks, and double those inside: "a ""b""".'

# Name, file, content, the message after the file's name.
TABLES = [
    (
        "cell empty",
        "a.csv",
        "instruction,output\nQ,A\nQ,\n",
        ", row 3, field 'output': is empty. Write a text, or delete the row.",
    ),
    (
        "cells more",
        "a.csv",
        "instruction,output\nQ,A\nQ,A, and B\n",
        ", row 3: has 3 cells where the header has 2. Put texts with commas between quotation marks.",
    ),
    (
        "cells fewer",
        "a.csv",
        "instruction,input,output\nQ,,A\nQ,A\n",
        ", row 3: has 2 cells where the header has 3. Add the missing ones; empty cells are parted by commas too.",
    ),
    (
        "after lines",
        "a.csv",
        'instruction,output\n"Q\n2\n3",A\nQ,\n',
        ", row 5, field 'output': is empty. Write a text, or delete the row.",
    ),
    (
        "quote open",
        "a.csv",
        'instruction,output\nQ,A\nQ,"A\n',
        ", row 3: opens a quotation mark that is never closed. <QUOTING>",
    ),
    (
        "quote inside",
        "a.csv",
        'instruction,output\n"a "b" c",A\n',
        ", row 2: has a quotation mark inside a quoted cell that is not doubled. <QUOTING>",
    ),
    (
        "cr",
        "a.csv",
        "instruction,output\nQ,a\rb\n",
        ", row 2: has a carriage return outside of quotation marks. <QUOTING>",
    ),
    (
        "tsv cells",
        "a.tsv",
        "instruction\toutput\nQ\tA\nQ\tA\tB\n",
        ", row 3: has 3 cells where the header has 2. Put texts with tabs between quotation marks.",
    ),
    (
        "csv turns",
        "a.csv",
        "messages\nhello\n",
        ", row 2, field 'messages': is a text ('hello'), not a list. Write a list of {\"role\": ..., "
        '"content": ...} objects, the user first, the assistant last.',
    ),
]


@pytest.mark.parametrize(("file", "content", "expected"), [pytest.param(*case, id=name) for name, *case in TABLES])
def test_tables(tmp_path: Path, file: str, content: str, expected: str) -> None:
    assert f"\n  - {file}{expected.replace('<QUOTING>', QUOTING)}" in complaint(tmp_path / file, content)
