"""Random recipes, overrides and files of rows: rows or a recipe, or one of our errors; never another exception."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huarizo.data.rows import read_rows
from huarizo.errors import HuarizoError, RecipeError
from huarizo.recipe import Recipe, load_recipe, to_yaml
from huarizo.recipe_help import fields

QUICK, LONG = 150, 5_000  # inputs of each kind
COUNTS = [QUICK, pytest.param(LONG, marks=pytest.mark.slow)]
KEYS = [key for key, _ in fields(Recipe)]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.sampled_from(["auto", "int8", "chat"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
ROW = st.dictionaries(
    st.sampled_from(["instruction", "input", "output", "prompt", "completion", "messages", "conversations", "text", "role"]),
    VALUES | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": VALUES}), max_size=4),
    max_size=5,
)  # fmt: skip
CELL = st.text(st.characters(codec="utf-8") | st.sampled_from(list('",;\n\r\t|\\')), max_size=20)


def often(count: int) -> settings:
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def check_recipe(path: Path, text: str | bytes, overrides: list[str]) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        assert str(error)
        return
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def check_rows(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        read_rows(path, {})
    except HuarizoError as error:
        assert path.name in str(error)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["text", "bytes", "values", "overrides"])
def test_recipes(tmp_path: Path, kind: str, count: int) -> None:
    path = tmp_path / "recipe.yaml"
    nested = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=5)
    texts: Any = {
        "text": st.text(st.sampled_from(list("[]{}:,-&*!|>'\"%@` \n#?ab1.~")) | st.characters(), max_size=60),
        "bytes": st.binary(max_size=60),
        "values": nested.map(lambda values: json.dumps(unflattened(values))),
        "overrides": st.just("model: quickstart"),
    }[kind]
    override = st.tuples(st.sampled_from(KEYS) | st.text(max_size=12), st.text(max_size=20)).map("=".join)

    @often(count)
    @given(texts, st.lists(override, max_size=3) if kind == "overrides" else st.just([]))
    def check(text: Any, overrides: list[str]) -> None:
        check_recipe(path, text, overrides)

    check()


def unflattened(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections; what does not fit stays flat."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, last = key.rpartition(".")
        inside = nested.setdefault(section, {}) if section else nested
        (inside if isinstance(inside, dict) else nested)[last or key] = value
    return nested


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_rows_of_random_bytes(tmp_path: Path, suffix: str, count: int) -> None:
    @often(count)
    @given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
    def check(data: bytes) -> None:
        check_rows(tmp_path / f"rows{suffix}", data)

    check()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_rows_of_almost_the_right_form(tmp_path: Path, suffix: str, count: int) -> None:
    rows = st.lists(ROW, max_size=5)
    tables = st.lists(st.lists(CELL, min_size=1, max_size=4), min_size=1, max_size=5)
    texts: Any = {
        ".json": rows.map(json.dumps),
        ".jsonl": rows.map(lambda found: "\n".join(map(json.dumps, found))),
        ".csv": tables.map(lambda table: "instruction,input,output\n" + "\n".join(",".join(cells) for cells in table)),
    }[suffix]

    @often(count)
    @given(texts)
    def check(text: str) -> None:
        check_rows(tmp_path / f"rows{suffix}", text.encode("utf-8", "surrogatepass"))

    check()


@pytest.mark.parametrize("count", COUNTS)
def test_parquet_files_with_changed_bytes(tmp_path: Path, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": ["a", "b"] * 20, "output": ["c", "d"] * 20}), path)
    whole = path.read_bytes()

    @often(count)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=4))
    def check(changes: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for place, value in changes:
            data[place] = value
        check_rows(path, bytes(data))

    check()
