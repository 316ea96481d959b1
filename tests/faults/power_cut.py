"""A small model of a POSIX file system that loses its power: what a disk may hold after the first k operations.

What was flushed is there. Of what was not, any part may be: each folder's entries are separate changes of which any
subset may have reached the disk, in their order, and of an unflushed file any beginning, or zeros in its length.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.operations import Operation

Change = tuple[str | None, str | None, int]  # name that goes, name that comes, inode


@dataclass
class Inode:
    """A file's bytes or a folder's entries, as they are on the disk, and the changes that may not be there yet."""

    is_folder: bool
    flushed: bytes = b""
    unflushed: bytes = b""
    entries: dict[str, int] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)


class Disk:
    """Replays operations below `root`, which stands for a folder that is there and flushed; what is above never changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inodes = [Inode(is_folder=True)]
        self.paths: dict[Path, int] = {root: 0}
        self.open: dict[int, int] = {}

    def do(self, operation: Operation) -> None:
        """One operation, as `tests.faults.operations` noted it."""
        name, args = operation.name, operation.args
        if name == "open":
            path = Path(args[0])
            if path in self.root.parents:
                self.inodes.append(Inode(is_folder=True))
                self.paths[path] = len(self.inodes) - 1
            elif path not in self.paths:
                self._new(path, is_folder=False)
            self.open[operation.result] = self.paths[path]
        elif name == "write":
            self.inodes[self.open[args[0]]].unflushed += args[1][: operation.result]
        elif name == "fsync":
            self._flush(self.inodes[self.open[args[0]]])
        elif name == "close":
            self.open.pop(args[0])
        elif name == "mkdir":
            self._new(Path(args[0]), is_folder=True)
        elif name == "replace":
            self._rename(Path(args[0]), Path(args[1]))
        else:  # unlink, rmdir
            path = Path(args[0])
            self._folder(path).pending.append((path.name, None, self.paths.pop(path)))

    def _folder(self, path: Path) -> Inode:
        return self.inodes[self.paths[path.parent]]

    def _new(self, path: Path, is_folder: bool) -> None:
        self.inodes.append(Inode(is_folder))
        self.paths[path] = len(self.inodes) - 1
        self._folder(path).pending.append((None, path.name, len(self.inodes) - 1))

    def _rename(self, old: Path, new: Path) -> None:
        assert old.parent == new.parent
        moved = {p: new / p.relative_to(old) for p in self.paths if p == old or old in p.parents}
        for before, after in moved.items():
            self.paths[after] = self.paths.pop(before)
        self._folder(new).pending.append((old.name, new.name, self.paths[new]))

    @staticmethod
    def _flush(inode: Inode) -> None:
        inode.flushed, inode.unflushed = inode.flushed + inode.unflushed, b""
        for change in inode.pending:
            _apply(inode.entries, change)
        inode.pending = []

    def after_power_cut(self, choice: random.Random, share: float) -> dict[str, bytes | None]:
        """One state that the disk may be in: relative path -> bytes, or None for a folder.

        share: how probable it is that a change had reached the disk; 0 and 1 give the extremes.
        """
        return dict(self._walk(0, "", choice, share))

    def _walk(
        self, number: int, prefix: str, choice: random.Random, share: float
    ) -> Iterator[tuple[str, bytes | None]]:
        inode = self.inodes[number]
        if not inode.is_folder:
            length = round(len(inode.unflushed) * (share if share in (0, 1) else choice.random()))
            there = inode.unflushed[:length]
            yield prefix, inode.flushed + (b"\0" * length if choice.random() < 0.3 else there)
            return
        yield prefix, None
        entries = dict(inode.entries)
        for change in inode.pending:
            if choice.random() < share:
                _apply(entries, change)
        for name, inner in entries.items():
            yield from self._walk(inner, f"{prefix}/{name}".lstrip("/"), choice, share)


def _apply(entries: dict[str, int], change: Change) -> None:
    gone, come, inode = change
    if gone is not None:
        entries.pop(gone, None)
    if come is not None:
        entries[come] = inode


def materialise(state: dict[str, bytes | None], target: Path) -> None:
    """Write a state as real files."""
    for name, content in state.items():
        if content is None:
            (target / name).mkdir(exist_ok=True)
        else:
            (target / name).write_bytes(content)
