"""Configs and splits are recognised by file names, and an unclear choice is refused."""

import pytest

from huarizo.errors import DataError
from huarizo.hub.data_files import Part, choose, split_name

SHARDS = [
    f"data/{split}-0000{n}-of-00002-ab12.parquet" for split in ("train_sft", "test_sft", "train_gen") for n in (0, 1)
]
SAVED = [
    f"{split}/{file}" for split in ("sft", "dpo") for file in ("data-00000-of-00001.arrow", "state.json", "x.json")
]


def test_names_with_config_and_split() -> None:
    assert split_name("a/b@c0ffee:main[test]") == ("a/b@c0ffee", Part("main", "test"))
    assert split_name("a/b[train]") == ("a/b", Part("", "train"))
    assert split_name("a/b:en/part") == ("a/b", Part("en/part"))
    for plain in ("a/b", "folder/rows.json", "quickstart", "", "[test]", "https://a/b", "C:/rows.json"):
        assert split_name(plain) == (plain, Part())
    for part in (Part(), Part("x"), Part("", "y"), Part("x", "y")):
        assert split_name(f"a/b{part}") == ("a/b", part)


CHOSEN = [  # files, part, heldout, what is read, note
    (["a.json", "b.csv"], Part(), False, ["a.json", "b.csv"], ""),
    (["x/a.json", "y/b.csv"], Part(), False, ["x/a.json", "y/b.csv"], ""),
    (["a.json", "eval.json"], Part(), False, ["a.json"], "not read: split eval"),
    (["a.json", "eval.json"], Part(), True, ["eval.json"], "split eval, not read: split without a name"),
    (["a.json", "eval.json"], Part("", "evaluation"), False, ["eval.json"], "split eval, not read: split without a n"),
    (["test.json"], Part(), False, ["test.json"], ""),
    (["train.json"], Part(), True, ["train.json"], ""),
    (["train_1.json", "train_2.json", "dev.json"], Part(), False, ["train_1.json", "train_2.json"], "split train, not"),
    (SHARDS, Part("", "train_gen"), False, SHARDS[4:], "split train_gen, not read: split test_sft, train_sft"),
    (SHARDS, Part(), True, SHARDS[2:4], "split test_sft"),
    (["en/train.csv", "de/train.csv"], Part("de"), False, ["de/train.csv"], "config de"),
    (["default/train.csv", "de/train.csv"], Part(), False, ["default/train.csv"], "config default"),
    (["a/train.csv", "a/test.csv"], Part("a", "test"), False, ["a/test.csv"], "split test, not read: split train"),
    (["one.json", "two.json"], Part("two"), False, ["two.json"], "config two"),
    ([*SAVED, "cache-1.arrow"], Part("", "dpo"), False, ["dpo/data-00000-of-00001.arrow"], "split dpo, not read"),
]


@pytest.mark.parametrize(("files", "part", "heldout", "read", "note"), CHOSEN)
def test_what_is_read(files: list[str], part: Part, heldout: bool, read: list[str], note: str) -> None:
    files = [file for file in files if not file.endswith("x.json")]
    chosen = choose("rows", files, part, heldout)
    assert chosen.files == read
    assert note in chosen.note and bool(note) == bool(chosen.note)
    assert choose("rows", files, chosen.part, heldout).files == read, "what was chosen is found again by its part"


@pytest.mark.parametrize(
    ("files", "part", "heldout", "said"),
    [
        (SHARDS, Part(), False, r"several splits \(test_sft, train_gen, train_sft\).*Write rows\[test_sft\]"),
        (["a/train.csv", "b/train.csv", "b/test.csv"], Part(), False, r"several configs \(a, b\).*Write rows:a"),
        (["train.csv", "dev.csv", "test.csv"], Part(), True, r"several splits .*Write rows\["),
        (["dev.csv", "test.csv"], Part(), False, r"several splits \(validation, test\)"),
        (["a.csv"], Part("b"), False, r"no config 'b'.*There are: a\.csv"),
        (["a.csv"], Part("", "test"), False, r"no split 'test'.*There are: no splits"),
    ],
)
def test_an_unclear_choice_is_refused(files: list[str], part: Part, heldout: bool, said: str) -> None:
    with pytest.raises(DataError, match=said):
        choose("rows", files, part, heldout)


def test_files_of_the_hub_that_differ_in_more_than_numbers_are_not_mixed() -> None:
    pieces = ["train-00000-of-00002-ab.parquet", "train-00001-of-00002-cd.parquet", "test-00000-of-00001-ef.parquet"]
    assert choose("a/b", pieces, Part(), published=True).files == pieces[:2]
    assert choose("a/b", ["part1.json", "part_02.json"], Part(), published=True).files == ["part1.json", "part_02.json"]
    for different in (["rows.json", "rows_cleaned.json"], ["en/rows.json", "de/rows.json"]):
        with pytest.raises(DataError, match=r"only mixed on request\. Write a/b:"):
            choose("a/b", different, Part(), published=True)
