"""Files that were cut off, changed, emptied, swapped or brought from elsewhere: a message each, no wrong result.

A run that was stopped half-way and a finished one are copied, one file of them or of what they were made from is
damaged, and the command that reads it is called.
"""

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.children import Lab, call, ended, outcome, start
from tests.faults.operations import kill_at

Damage = Callable[[random.Random, Path, Path], None]  # the file, and another one of its kind


def cut_off(choice: random.Random, file: Path, other: Path) -> None:
    os.truncate(file, choice.randrange(file.stat().st_size or 1))


def bits_flipped(choice: random.Random, file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes() or b"\0")
    for _ in range(choice.choice((1, 1, 3, 50))):
        data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    file.write_bytes(data)


def emptied(choice: random.Random, file: Path, other: Path) -> None:
    file.write_bytes(b"")


def deleted(choice: random.Random, file: Path, other: Path) -> None:
    file.unlink()


def swapped(choice: random.Random, file: Path, other: Path) -> None:
    mine, others = file.read_bytes(), other.read_bytes()
    file.write_bytes(others)
    other.write_bytes(mine)


def noise(choice: random.Random, file: Path, other: Path) -> None:
    file.write_bytes(choice.randbytes(choice.choice((10, 1000, 100_000))))


def from_another_run(choice: random.Random, file: Path, other: Path) -> None:
    """The same file of a run with another seed, rank and data."""
    stranger = next(folder / "stranger" for folder in file.parents if (folder / "stranger").is_dir())
    found = sorted(stranger.rglob(file.name), key=lambda path: path.parent.name != file.parent.name)
    if found:
        shutil.copy(found[0], file)


DAMAGES: tuple[Damage, ...] = (cut_off, bits_flipped, bits_flipped, emptied, deleted, swapped, noise, from_another_run)


def prepare(lab: Lab) -> None:
    """A run that was stopped half-way, and one of another seed."""
    ended(start(lab.folder / "stopped", lab.folder / "recipe.yaml", kill_at(lab.operations * 6 // 10)))
    text = (lab.folder / "recipe.yaml").read_text()
    (lab.folder / "stranger.yaml").write_text(
        text.replace("dropout: 0.1", "r: 4").replace("keep: 2", "keep: 2, seed: 7")
    )
    assert ended(start(lab.folder / "stranger", lab.folder / "stranger.yaml")) == 0


def cases(lab: Lab, count: int, seed: int) -> Iterator[tuple[str, Callable[[Lab, Path], None]]]:
    """So many cases, of each kind of file in turn."""
    for number in range(count):
        yield f"damage-{number}", lambda lab, run, n=number: one_damage(lab, run, random.Random(seed * 10_000 + n), n)


def one_damage(lab: Lab, place: Path, choice: random.Random, number: int) -> None:
    """Copy everything, damage one file, call what reads it, and judge."""
    kind = ("checkpoint", "checkpoint", "run", "adapter", "model", "data", "recipe")[number % 7]
    finished = kind == "adapter"
    shutil.copytree(lab.folder / ("whole" if finished else "stopped"), place)
    for name in ("model", "rows.json", "recipe.yaml"):
        (shutil.copytree if name == "model" else shutil.copy)(lab.folder / name, place / name)
    _repoint(lab.folder, place)
    files = {
        "checkpoint": [f for f in (place / "run" / "checkpoints").rglob("*") if f.is_file()],
        "run": [f for f in (place / "run").glob("*") if f.is_file()],
        "adapter": [f for f in (place / "run" / "adapter").rglob("*") if f.is_file()],
        "model": list((place / "model").iterdir()),
        "data": [place / "rows.json"],
        "recipe": [place / "recipe.yaml"],
    }[kind]
    file = choice.choice(sorted(files))
    other = choice.choice(sorted({*files, place / "rows.json", place / "recipe.yaml"} - {file}))
    before, damage = file.read_bytes(), cut_off
    while file.is_file() and file.read_bytes() == before:
        damage = choice.choice(DAMAGES)
        damage(choice, file, other)
    arguments = {"adapter": ["ask", str(place / "run"), "Count to 3", "--max-new-tokens", "4"],
                 "recipe": ["train", str(file), f"output={place}/new"]}.get(kind, ["resume", str(place / "run")])  # fmt: skip
    code, said = call(place, arguments)
    about = f"{kind} {file.name} {damage.__name__}: exit {code}\n{said}"
    with (lab.folder / "exit codes").open("a") as tally:
        tally.write(f"{code}\n")
    assert "Traceback" not in said, about
    assert code in (0, 2, 3), about
    if code:
        assert re.search(r"^huarizo: .{20,}", said, re.MULTILINE), about
    elif finished:
        assert file.name in ("README.md", "manifest.json") or kind != "adapter", about
    elif kind != "recipe" and "changed since" not in said:
        got = outcome(place)
        same = {key: got[key] == lab.expected[key] for key in ("adapter", "metrics", "samples")}
        assert all(same.values()), f"a wrong result: {same}; {about}"


def _repoint(old: Path, place: Path) -> None:
    """The copy's recipes name the copy's own files."""
    for file in place.rglob("recipe.yaml"):
        if "checkpoints" not in file.parts:
            text = re.sub(rf"{re.escape(str(old))}/(model|rows\.json)", rf"{place}/\1", file.read_text())
            file.write_text(text)
