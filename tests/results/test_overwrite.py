"""What a command may write over, and what it never may."""

import os
from pathlib import Path

import pytest

from huarizo.errors import UserError
from huarizo.results.gguf import export_adapter, export_gguf
from huarizo.results.model_folder import merge
from huarizo.results.overwrite import check_file, check_folder
from tests.results.make import make_tuned


def test_a_file_is_replaced_only_when_asked_and_a_folder_never(tmp_path: Path) -> None:
    check_file(tmp_path / "new.gguf", force=False)
    (tmp_path / "old.gguf").touch()
    check_file(tmp_path / "old.gguf", force=True)
    with pytest.raises(UserError, match="--force"):
        check_file(tmp_path / "old.gguf", force=False)
    with pytest.raises(UserError, match="is a folder. Name a file"):
        check_file(tmp_path, force=True)
    with pytest.raises(UserError, match="is a file, not a folder"):
        check_file(tmp_path / "old.gguf" / "more" / "new.gguf", force=True)


def test_a_link_that_leads_nowhere_is_something_too(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="already exists"):
        check_file(tmp_path / "link", force=False)


def test_only_a_folder_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    check_folder(tmp_path / "new", False, "config.json")
    check_folder(tmp_path, True, "config.json")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="remove it yourself"):
        check_folder(tmp_path, True, "config.json")
    (tmp_path / "config.json").touch()
    check_folder(tmp_path, True, "config.json")
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match="remove it yourself"):
        check_folder(tmp_path, True, "config.json")
    with pytest.raises(UserError, match="this is a file"):
        check_folder(tmp_path / "notes.txt", True, "config.json")


def test_merging_never_takes_the_base_or_the_adapter_away(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    for target in (tuned.base, tuned.adapter, tmp_path):
        with pytest.raises(UserError, match="would be lost"):
            merge(tuned, target, force=True)
    assert (tuned.base / "model.safetensors").is_file() and (tuned.adapter / "adapter_model.safetensors").is_file()


def test_a_pipe_a_device_and_the_model_itself_are_no_place_for_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match="device or a pipe"):
            check_file(place, force=True)
    tuned = make_tuned(tmp_path)
    for file in (tuned.base / "model.safetensors", tuned.adapter / "adapter_model.safetensors"):
        before = file.read_bytes()
        with pytest.raises(UserError, match="part of the model being exported"):
            export_gguf(tuned, file, "f32", force=True)
        with pytest.raises(UserError, match="part of the model being exported"):
            export_adapter(tuned, file, force=True)
        assert file.read_bytes() == before


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the current folder"):
        check_folder(Path(), True, "config.json")
    with pytest.raises(UserError, match="needs a name"):
        check_folder(Path("new/.."), True, "config.json")
