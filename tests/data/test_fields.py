"""A value that is no sound text is reported with file, row, field and remedy."""

from pathlib import Path

import pytest

from tests.data.reading import GOOD, complaint_about

# Name, the second of three rows, the message after "a.json, row 2".
VALUES = [
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
        ", field 'output': occurs 2 times in one object. Keep one of them.",
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
]


@pytest.mark.parametrize(("bad", "expected"), [pytest.param(*case, id=name) for name, *case in VALUES])
def test_a_value_that_is_no_sound_text(tmp_path: Path, bad: str, expected: str) -> None:
    message = complaint_about(tmp_path / "a.json", f"[{GOOD}, {bad}, {GOOD}]")
    assert message.startswith("1 of 3 rows can't be used:\n")
    assert f"\n  - a.json, row 2{expected}\n" in message
    assert message.endswith("Fix them in the file, or leave them out: data.on_bad_row=skip")
