"""The configs and splits that a data set's card declares are the ones that are read."""

from pathlib import Path

import pytest

from huarizo.errors import DataError
from huarizo.hub.data_card import LARGEST_CARD, Config, declared
from huarizo.hub.data_files import Part, choose
from huarizo.hub.names import resolve_data

CARD = """---
license: mit
license: twice
configs:
- config_name: plain
  data_files: all.csv
# a remark
- config_name: chat
  default: true
  data_files:
  - split: train
    path: ["part/**/a-*.csv", "./x.csv"]
  - split: gold
    path: held.csv

- config_name: named
  data_dir: named
- config_name: 2024
  data_files: [{split: train, path: nowhere.csv}]
dataset_info: [
---
# Rows
configs: [nothing]
"""
FILES = ["all.csv", "held.csv", "named/test.csv", "named/train.csv", "part/a-1.csv", "part/b/c/a-2.csv", "part/b.csv"]
FILES += ["x.csv", "y.csv"]


@pytest.mark.parametrize(
    ("part", "heldout", "read", "note"),
    [
        (
            Part(),
            False,
            ["part/a-1.csv", "part/b/c/a-2.csv", "x.csv"],
            "config chat, split train, not read: split gold",
        ),
        (Part(), True, ["held.csv"], "config chat, split gold, not read: split train"),
        (Part("chat", "gold"), False, ["held.csv"], "config chat, split gold, not read: split train"),
        (Part("plain"), False, ["all.csv"], "config plain"),
        (Part("named"), False, ["named/train.csv"], "config named, split train, not read: split test"),
        (Part("y.csv"), False, ["y.csv"], "config y.csv"),
    ],
)
def test_what_the_card_declares_is_read(part: Part, heldout: bool, read: list[str], note: str) -> None:
    for published in (False, True):
        chosen = choose("a/b", FILES, part, heldout, published, CARD)
        assert chosen.files == read
        assert chosen.note == f"a/b: {note}"
        assert choose("a/b", FILES, chosen.part, published=published, card=CARD).files == read


def test_one_config_is_the_one_that_is_meant() -> None:
    card = "---\nconfigs:\n- data_files: b.csv\n---\n"
    assert choose("a/b", ["a.csv", "b.csv"], Part(), published=True, card=card).files == ["b.csv"]
    assert declared(card) == {"default": Config({"train": ("b.csv",)}, is_default=True)}


@pytest.mark.parametrize(
    ("card", "part", "said"),
    [
        (CARD, Part("2024"), "none of the files that README.md names for the config '2024'"),
        (CARD, Part("chat", "dev"), "no split 'dev'.*There are: train, gold"),
        (CARD.replace("default: true", "x: 1"), Part(), r"several configs \(plain, chat, named, 2024\).*a/b:plain"),
        ("---\nconfigs: [\n---\n", Part(), r"README\.md: `configs:` is not valid YAML.*a/b:FILE"),
        ("---\nconfigs: a\n---\n", Part(), "is not a list"),
        ("---\nconfigs:\n- a\n---\n", Part(), "config_name"),
        ("---\nconfigs:\n- data_files: [{split: [1], path: x}]\n---\n", Part(), "config_name"),
        ("---\nconfigs:\n" + "- data_files: x\n" * 10_000 + "---\n", Part(), "too many"),
        ("---\nconfigs: [&a [1, 2], " + "*a, " * 20_000 + "]\n---\n", Part(), "values with its aliases expanded"),
    ],
)
def test_an_unclear_choice_or_a_broken_card_is_refused(card: str, part: Part, said: str) -> None:
    with pytest.raises(DataError, match=said):
        choose("a/b", FILES, part, card=card)


@pytest.mark.parametrize(
    "card", ["", "# Rows", "---\nconfigs:\n---\n", "---\na: 1\n---\nconfigs: [a]", "---\nconfigs: a"]
)
def test_a_card_without_configs_says_nothing(card: str) -> None:
    assert declared(card) == {}


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    config = Config({"train": ("*a" * 40 + "b", "**/" * 40 + "b")})
    assert config.files(["a" * 200, "/".join("a" * 100)]) == {"train": []}


def test_a_folder_with_a_card(tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("instruction,output\na,b\n")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: two.csv\n---\n")
    assert resolve_data(str(tmp_path)).files == (tmp_path / "two.csv",)
    (tmp_path / "README.md").write_bytes(b" " * (LARGEST_CARD + 1))
    with pytest.raises(DataError, match="README.md can't be read"):
        resolve_data(str(tmp_path))
