"""Every format in every container is read to the same rows, byte for byte, and no file makes it stumble."""

import codecs
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from huarizo.data import rows as rows_module
from huarizo.data.formats import QUESTIONS
from huarizo.data.rows import Exchange, Problem, Row, Rows, read_rows, require_good, write_skipped
from huarizo.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"

SUFFIXES = [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"]
SUFFIXES += [".arrow", ".jsonl.gz", ".json.zst", ".csv.gz"]
KOREAN = "세종대왕은 1443년에 훈민정음을 만들었다. 🦙👩🏽‍🚀"
TURNS = [
    ("system", "간결하게"),
    ("user", "안녕?"),
    ("assistant", "네\r\n안녕하세요 🦙"),
    ("user", " Q2\t"),
    ("assistant", "A2\n"),
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records in the container that the suffix says. In tables, lists are written as JSON."""
    suffix = path.suffix
    if suffix in (".gz", ".zst"):
        plain = write(path.with_suffix(""), records)
        packing = {".gz": "gzip", ".zst": "zstd"}[suffix]
        with pa.CompressedOutputStream(str(path), packing) as file:
            file.write(plain.read_bytes())
        plain.unlink()
    elif suffix == ".arrow":
        table = pa.Table.from_pylist(records)
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    elif suffix == ".json":
        path.write_bytes(json.dumps(records, ensure_ascii=False).encode())
    elif suffix in (".jsonl", ".ndjson"):
        path.write_bytes("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(records[0]), delimiter="," if suffix == ".csv" else "\t")
            table.writeheader()
            for record in records:
                table.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()})
    return path


def conversations(rows: Rows) -> list[tuple[str, tuple[Exchange, ...]]]:
    return [(row.system, row.exchanges) for row in require_good(rows, "fail")]


RECORDS = {
    "alpaca": {
        "instruction": " Q2\t",
        "input": "",
        "output": "A2\n",
        "system": "간결하게",
        "history": [["안녕?", "네\r\n안녕하세요 🦙"]],
    },
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS
        ]
    },
    "messages": {"messages": [{"role": role, "content": text} for role, text in TURNS]},
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("format", RECORDS)
def test_multi_turn_in_every_container(tmp_path: Path, format: str, suffix: str) -> None:
    rows = read_rows(write(tmp_path / f"a{suffix}", [RECORDS[format]] * 3))
    exchanges = (Exchange("안녕?", "", "네\r\n안녕하세요 🦙"), Exchange(" Q2\t", "", "A2\n"))
    assert conversations(rows) == [("간결하게", exchanges)] * 3
    assert (rows.format, rows.files, rows.problem_count) == (format, [tmp_path / f"a{suffix}"], 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_single_turn_in_every_container(tmp_path: Path, suffix: str) -> None:
    alpaca = [
        {"instruction": KOREAN, "input": "x", "output": "Y", "id": 1},
        {"instruction": "Q", "input": "", "output": "A", "id": 2},
    ]
    expected = [("", (Exchange(KOREAN, "x", "Y"),)), ("", (Exchange("Q", "", "A"),))]
    assert conversations(read_rows(write(tmp_path / f"a{suffix}", alpaca))) == expected
    prompts = [{"prompt": KOREAN, "completion": "Y", "system": "S"}]
    rows = read_rows(write(tmp_path / f"b{suffix}", prompts))
    assert (rows.format, conversations(rows)) == ("prompt-completion", [("S", (Exchange(KOREAN, "", "Y"),))])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_without_an_answer_are_taken_where_they_are_asked_for(tmp_path: Path, suffix: str) -> None:
    asked = write(tmp_path / f"a{suffix}", [{"instruction": KOREAN, "input": "x", "system": "S", "id": 1}])
    prompts = write(tmp_path / f"b{suffix}", [{"prompt": KOREAN, "system": "S", "base": "x", "tuned": "y"}])
    for path, format, input in ((asked, "instructions", "x"), (prompts, "prompts", "")):
        rows = read_rows(path, formats=QUESTIONS)
        assert (rows.format, conversations(rows)) == (format, [("S", (Exchange(KOREAN, input, ""),))])
        with pytest.raises(DataError):
            read_rows(path)
    whole = write(tmp_path / f"c{suffix}", [{"instruction": "Q", "input": "", "output": "A"}])
    assert read_rows(whole, formats=QUESTIONS) == read_rows(whole)
    named = write(tmp_path / f"d{suffix}", [{"question": "Q"}])
    assert conversations(read_rows(named, {"instruction": "question"}, QUESTIONS)) == [("", (Exchange("Q", "", ""),))]


def test_absent_and_null_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        '[{"instruction": "Q", "output": "A"}, {"instruction": "Q", "input": null, "output": "A", "history": []},'
        '{"instruction": "Q", "output": "A", "system": null, "history": null, "extra": {"a": [NaN]}}]'
    )
    assert conversations(read_rows(path)) == [("", (Exchange("Q", "", "A"),))] * 3


def test_prompt_and_completion_as_messages(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    record = {"prompt": [{"role": "system", "content": "S"}, user, answer, user], "completion": [answer]}
    rows = read_rows(write(tmp_path / "a.parquet", [record]))
    assert conversations(rows) == [("S", (Exchange("Q", "", "A", learnt=False), Exchange("Q", "", "A")))]


def test_system_beside_the_turns_and_roles_mixed(tmp_path: Path) -> None:
    turns = [{"role": "human", "value": "Q"}, {"from": "assistant", "content": "A", "weight": 1}]
    for name in ("conversations", "messages"):
        rows = read_rows(write(tmp_path / "a.json", [{"id": "x", name: turns, "system": "S"}]))
        assert conversations(rows) == [("S", (Exchange("Q", "", "A"),))]


@pytest.mark.parametrize(
    "data",
    [
        '{"data": [%s, %s], "version": "1.0"}',
        '{"rows": [\n%s\n,%s]}',
        "\ufeff[%s,\r\n%s]\r\n",
        "%s\n%s",
        "\n\n%s\r\n\r\n%s\r\n",
        "\ufeff%s\n%s\n",
    ],
    ids=["data", "rows", "mark", "lines", "blank lines", "lines with mark"],
)
def test_shapes_of_json(tmp_path: Path, data: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes((data % ('{"instruction": "Q1", "output": "A"}', '{"instruction": "Q2", "output": "A"}')).encode())
    assert [row.exchanges[0].instruction for row in require_good(read_rows(path), "fail")] == ["Q1", "Q2"]


TURN_LISTS = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]] * 2


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": ["Q", "Q"], "input": ["", ""], "output": ["A", "A"]},
        {"instruction": {"0": "Q", "1": "Q"}, "output": {"0": "A", "1": "A"}},
        {"messages": TURN_LISTS},
        {"messages": TURN_LISTS, "id": [1, 2]},
    ],
    ids=["columns", "pandas", "one column", "turns"],
)
def test_json_by_columns(tmp_path: Path, value: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value))
    assert conversations(read_rows(path)) == [("", (Exchange("Q", "", "A"),))] * 2
    assert [row.number for row in read_rows(path).rows] == [1, 2]


def test_columns_under_other_names_are_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"question": ["Q"], "answer": ["A"]}))
    with pytest.raises(DataError, match="data.columns.instruction=question data.columns.output=answer"):
        read_rows(path)
    rows = read_rows(path, {"instruction": "question", "output": "answer"})
    assert conversations(rows) == [("", (Exchange("Q", "", "A"),))]


def test_what_save_to_disk_leaves(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list([{"instruction": "Q", "output": "A", "id": 1}] * 3)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    assert conversations(read_rows(tmp_path / "one")) == [("", (Exchange("Q", "", "A"),))] * 3
    DatasetDict({"train": one.select([0]), "test": one}).save_to_disk(tmp_path / "several")
    assert len(read_rows(tmp_path / "several").rows) == 1, "the training split only"
    table = one.data.table
    with pa.ipc.new_file(str(tmp_path / "footer.arrow"), table.schema) as file:
        file.write_table(table)
    assert len(read_rows(tmp_path / "footer.arrow").rows) == 3


def test_a_packed_file_does_not_unpack_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huarizo.data.unpack.UNPACKED", 2**20)
    for suffix in (".jsonl.gz", ".jsonl.zst", ".json.gz"):
        path = tmp_path / f"a{suffix}"
        with pa.CompressedOutputStream(str(path), "gzip" if suffix.endswith("gz") else "zstd") as file:
            for _ in range(40):
                file.write(b"\n" * 2**18)
        with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
            read_rows(path)


def test_one_object_is_one_row_and_json_under_the_name_of_lines(tmp_path: Path) -> None:
    record = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    (tmp_path / "a.json").write_text(json.dumps(record, indent=2))
    (tmp_path / "b.jsonl").write_text(json.dumps(record, indent=2))
    (tmp_path / "c.jsonl").write_text(json.dumps([record, record], indent=2))
    (tmp_path / "d.jsonl").write_text(json.dumps([record, record]))
    for name, expected in {"a.json": 1, "b.jsonl": 1, "c.jsonl": 2, "d.jsonl": 2}.items():
        assert len(require_good(read_rows(tmp_path / name), "fail")) == expected, name


def test_marks_line_ends_and_numbers_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(codecs.BOM_UTF8 + 'output, instruction\r\n"A\r\n""2""",Q1\r\n\r\n한국 🦙,"Q,2"\r\n'.encode())
    rows = require_good(read_rows(path), "fail")
    assert rows == [
        Row(str(path), 2, "", (Exchange("Q1", "", 'A\r\n"2"'),)),
        Row(str(path), 5, "", (Exchange("Q,2", "", "한국 🦙"),)),
    ]
    limit = csv.field_size_limit()
    path.write_text(f"instruction,output\nQ,{'x' * 500_000}\n")
    assert len(require_good(read_rows(path), "fail")[0].exchanges[0].output) == 500_000
    assert csv.field_size_limit() == limit, "the csv module is left as it was"


def test_numbers_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"instruction": "Q\\u2028", "output": "A"}\n\n{"instruction": "Q\u2028\u0085", "output": "A"}')
    assert [(row.number, row.exchanges[0].instruction) for row in read_rows(path).rows] == [
        (2, "Q\u2028"),
        (4, "Q\u2028\x85"),
    ]


def test_column_mapping(tmp_path: Path) -> None:
    record = {"question": "Q", "answer": "A", "input": "not this", "instruction": "nor this"}
    columns = {"instruction": "question", "output": "answer", "input": "instruction"}
    for suffix in SUFFIXES:
        rows = read_rows(write(tmp_path / f"a{suffix}", [record]), columns)
        assert (rows.format, conversations(rows)) == ("alpaca", [("", (Exchange("Q", "nor this", "A"),))])
    swapped = read_rows(write(tmp_path / "b.json", [{"input": "Q", "output": "A"}]), {"instruction": "input"})
    assert conversations(swapped) == [("", (Exchange("Q", "", "A"),))], "a mapped column is not its own field as well"
    turns = read_rows(write(tmp_path / "c.json", [{"chat": RECORDS["messages"]["messages"]}]), {"messages": "chat"})
    assert turns.format == "messages"
    (tmp_path / "d.json").write_text('[{"question": "Q", "answer": "A"}, {"question": "Q", "answer": 1}]')
    bad = read_rows(tmp_path / "d.json", {"instruction": "question", "output": "answer"})
    assert [problem.field for problem in bad.problems] == ["answer"], "problems name the column as the file does"


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    for name in ("b.json", "sub/deeper/a.csv", "a.jsonl", "sub/c.parquet", ".cache/x.json", ".x.json"):
        write(tmp_path / name, [{"instruction": name, "output": "A"}])
    for name in ("README.md", "dataset_infos.json", "LICENSE", "notes.txt"):
        (tmp_path / name).write_text("[not data")
    (tmp_path / "sub" / "again").symlink_to(tmp_path, target_is_directory=True)
    names = ["a.jsonl", "b.json", "sub/c.parquet", "sub/deeper/a.csv"]
    rows = read_rows(tmp_path)
    assert rows.files == [tmp_path / name for name in names]
    assert [(row.file, row.exchanges[0].instruction) for row in rows.rows] == [(str(tmp_path / n), n) for n in names]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (["alpaca_train.json", "alpaca_eval.json"], ["alpaca_train.json"]),
        (["default/train/0.parquet", "default/test/0.parquet"], ["default/train/0.parquet"]),
        (["trained.json", "constraints.json"], ["constraints.json", "trained.json"]),
    ],
)
def test_only_the_train_split_of_a_folder(tmp_path: Path, names: list[str], chosen: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, [{"instruction": name, "output": "A"}])
    assert [file.relative_to(tmp_path).as_posix() for file in read_rows(tmp_path).files] == chosen


def test_a_link_keeps_the_name_it_has(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('[{"instruction": "Q", "output": "A"}]')
    (tmp_path / "train.json").symlink_to(tmp_path / "blob")
    assert read_rows(tmp_path / "train.json").rows == read_rows(tmp_path).rows


def test_skip_and_what_is_written_of_it(tmp_path: Path) -> None:
    path = tmp_path / "알파카.jsonl"
    path.write_text(
        '{"instruction": "Q", "output": "A"}\nnonsense\n{"instruction": 1, "output": null}\n', encoding="utf-8"
    )
    rows = read_rows(path)
    assert [row.number for row in require_good(rows, "skip")] == [1]
    assert (rows.problem_count, rows.bad_row_count) == (3, 2)
    (tmp_path / "run").mkdir()
    write_skipped(rows.problems, tmp_path / "run" / "skipped.jsonl")
    written = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text("utf-8").splitlines()]
    assert [(line["row"], line["field"], line["what"]) for line in written] == [
        (2, "", "is not JSON: expecting value, column 1, near 'nonsense\\n'"),
        (3, "instruction", "is a number (1)"),
        (3, "output", "is null"),
    ]
    assert list(written[2].items())[-1] == ("remedy", "Write a text, or delete the row")
    assert written[0]["file"] == str(path)


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.json", [{"instruction": "Q", "output": ""}]))
    with pytest.raises(
        DataError, match=r"1 of 1 rows can't be used:\n.*\nNo good row is left\. Mend them in the file\."
    ):
        require_good(rows, "skip")


def test_problems_are_capped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_PROBLEMS", 1000)
    rows = read_rows(write(tmp_path / "a.json", [{"instruction": "Q", "output": 1}] * 1500))
    assert (len(rows.problems), rows.problem_count, rows.bad_row_count) == (1000, 1500, 1500)
    with pytest.raises(DataError) as caught:
        require_good(rows, "fail")
    assert str(caught.value).count("\n  - ") == 20
    assert "\n  ... and 1480 more\n" in str(caught.value)


def test_a_problem_in_words() -> None:
    problem = Problem("alpaca.json", 17, "output", "is a number (3)", 'Write it as a string: "3"')
    assert str(problem) == "alpaca.json, row 17, field 'output': is a number (3). Write it as a string: \"3\"."


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "pandas", "pyarrow", "datasets")
    code = f"import sys, huarizo.data.rows; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not (SHARED / "alpaca_en_demo.json").exists(), reason="shared/data is not beside the repository")
def test_real_rows_are_kept_in_every_form(tmp_path: Path) -> None:
    path = SHARED / "alpaca_en_demo.json"
    records = json.loads(path.read_text("utf-8"))
    expected = [("", (Exchange(each["instruction"], each["input"], each["output"]),)) for each in records]
    assert conversations(read_rows(path)) == expected
    for suffix in (".json", ".jsonl", ".csv", ".parquet"):
        target = write(tmp_path / f"a{suffix}", records)
        assert conversations(read_rows(target)) == expected


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
REQUIRED = TEXTS.filter(lambda text: not text.isspace())
ALPACA = st.fixed_dictionaries({"instruction": REQUIRED, "input": st.just("") | TEXTS, "output": REQUIRED})


@settings(max_examples=60, deadline=None)
@given(st.lists(ALPACA, min_size=1, max_size=5), st.sampled_from(SUFFIXES))
@example([{"instruction": "\ufeff\r", "input": "\n\r\n", "output": '"\u2028,\t\x1a\x85'}], ".csv")
@example([{"instruction": "\ufeff\r", "input": "\n\r\n", "output": '"\u2028,\t\x1a\x85'}], ".jsonl")
def test_any_text_is_kept(records: list[dict[str, str]], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(write(Path(folder, f"a{suffix}"), records))
    expected = [("", (Exchange(each["instruction"], each["input"], each["output"]),)) for each in records]
    assert conversations(rows) == expected


NAMES = st.sampled_from(["instruction", "output", "input", "history", "system", "messages", "conversations", "prompt"])
NAMES |= st.sampled_from(["completion", "role", "content", "from", "value", "data"]) | st.text(max_size=3)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
SCALARS |= st.sampled_from(["user", "assistant", "system", "human", "gpt", "\ud800", "\0", "[[1]]"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4))
ROWS = st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=4)


def assert_rows_or_a_message(path: Path) -> None:
    try:
        rows = read_rows(path)
        assert rows.problem_count >= rows.bad_row_count
        assert len(rows.rows) + rows.bad_row_count > 0
        [str(problem).encode() for problem in rows.problems]
        write_skipped(rows.problems, path.with_name("skipped"))
        require_good(rows, "skip")
    except DataError as error:
        str(error).encode()
        assert path.name in str(error)


@settings(max_examples=150, deadline=None)
@given(ROWS | VALUES, st.sampled_from([".json", ".jsonl"]))
@example([{"prompt": [], "completion": []}], ".json")
@example({"\ud800": [{"\ud800": 1}]}, ".json")
def test_any_json_is_rows_or_a_message(value: object, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        values = value if suffix == ".jsonl" and isinstance(value, list) else [value]
        path.write_text(json.dumps(value) if suffix == ".json" else "\n".join(json.dumps(each) for each in values))
        assert_rows_or_a_message(path)


BEGINNINGS = st.sampled_from(
    [b"", b"[", b'{"messages": [', b'[{"instruction": "', b"instruction,output\n", b"PAR1", b'"']
)
BEGINNINGS |= st.sampled_from([codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b'{"instruction": "Q", "output": "A"}\n{"\\u'])


@settings(max_examples=150, deadline=None)
@given(BEGINNINGS, st.binary(max_size=200), st.sampled_from([*SUFFIXES, ".txt", ".gz"]))
def test_any_bytes_are_rows_or_a_message(beginning: bytes, data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        path.write_bytes(beginning + data)
        assert_rows_or_a_message(path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_parquet_is_rows_or_a_message(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "a.parquet"), [RECORDS["messages"]] * 3)
        content = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        assert_rows_or_a_message(path)
