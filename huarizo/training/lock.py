"""Ensures that one process at a time trains in a run folder.

The lock is an flock, which the kernel releases when its holder ends, however that happens. The lock file also names
its holder, for messages and for folders that several machines share (Drive, NFS), where flock may hold on one machine
only. For those a thread renews the file's time, however long a step takes; a lock that was not renewed for STALE_AFTER
seconds is stale. A process that finds another holder in the file, say after a night in standby, has lost the lock and
stops writing.
"""

import errno
import json
import os
import platform
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huarizo.errors import MachineError, UserError
from huarizo.files import open_own, read_own, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STALE_AFTER = 600  # seconds without renewal, on a folder that several machines share
RENEW_EVERY = 30  # seconds
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs", "apfs", "bcachefs"}


class LockLostError(MachineError):
    """Another process has taken over the run. This one must not write to its folder any more."""


@dataclass(frozen=True)
class Holder:
    """The process named in a lock file."""

    pid: int
    host: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """Held within `with RunLock(folder) as lock:`.

    Raises (on entering):
        UserError: another process trains in this folder.
        MachineError: the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._descriptor = -1
        self._token = secrets.token_hex(8)
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)

    def __enter__(self) -> "RunLock":
        with writing(self.path):
            while self._descriptor < 0:
                self._descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT)
                try:
                    taken = self._take()
                except BaseException:
                    os.close(self._descriptor)
                    raise
                if not taken:
                    os.close(self._descriptor)
                    self._descriptor = -1
        self._thread.start()
        return self

    def _take(self) -> bool:
        """Lock the open file. False if its holder has just removed it, so that it has to be opened again."""
        exclusive = self._flock()
        if not self._is_ours():
            return False
        holder = _holder_in(os.pread(self._descriptor, 4096, 0))
        if exclusive is False or (holder and self._lives(holder, flock_says_free=exclusive is True)):
            raise UserError(
                f"{self.path.parent}: another process trains here ({holder or 'its name is not known'}). "
                f"Wait for it or stop it. If you know that it has ended, delete {self.path}"
            )
        who = {"pid": os.getpid(), "host": platform.node(), "token": self._token}
        note = json.dumps(who | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode()
        os.pwrite(self._descriptor, note, 0)
        os.ftruncate(self._descriptor, len(note))
        return True

    def _is_ours(self) -> bool:
        """Whether the open file is still the one at the path."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _flock(self) -> bool | None:
        """True: locked by us. False: locked by another process. None: this file system has no such locks."""
        if fcntl is None:
            return None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            return None
        return True

    def _lives(self, holder: Holder, flock_says_free: bool) -> bool:
        """Whether the holder named in the file may still be training, although this kernel sees no lock."""
        if holder.host == platform.node():
            return not flock_says_free and _runs(holder.pid)
        if flock_says_free and file_system(self.path) in LOCAL:
            return False
        return time.time() - os.fstat(self._descriptor).st_mtime < STALE_AFTER

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join(timeout=1)
        with suppress(OSError):  # if the drive is gone, the lock becomes stale
            if self._is_ours() and self._other_holder() is None:
                self.path.unlink()
        if not self._thread.is_alive():  # it hangs if the drive is gone
            os.close(self._descriptor)

    def _keep(self) -> None:
        """Renew the file's time every RENEW_EVERY seconds, until the lock is released or lost."""
        while self._lost is None and not self._ended.wait(RENEW_EVERY):
            with suppress(OSError):  # reported by the next save
                self._lost = self._other_holder()
                if self._lost is None:
                    os.utime(self._descriptor)

    def _other_holder(self) -> str | None:
        """Describe another holder named in the lock file, or None. Reopens it, as network drives cache content."""
        try:
            holder = _holder_in(read_own(self.path))
        except FileNotFoundError:
            return None
        return None if holder is None or holder.token == self._token else str(holder)

    def require_held(self) -> None:
        """Check what the renewing thread has seen.

        Raises:
            LockLostError: another process has taken over.
        """
        if self._lost is not None:
            raise LockLostError(
                f"{self.path.parent}: {self._lost} has taken over this run, because this process did not renew its "
                "lock in time. This process stops and writes nothing more. Leave the run to the other process, or stop "
                "that one and resume the run"
            )

    def require_folder(self) -> None:
        """Check that the path still leads to the folder that was locked, and that the lock is ours.

        When a drive is unmounted, the path leads to another folder or to none.

        Raises:
            LockLostError: another process has taken over.
            MachineError: the folder is a different one, or gone.
        """
        with writing(self.path.parent):
            self._lost = self._lost or self._other_holder()
            self.require_held()
            if not self._is_ours():
                raise MachineError(
                    f"{self.path.parent} is no longer the folder that the run started in: its drive was unmounted, or "
                    "the folder was moved or replaced. Mount the drive again, or put the folder back"
                )


def _holder_in(content: bytes) -> Holder | None:
    """The process named in a lock file's content; None if there is none."""
    try:
        note = json.loads(content)
    except ValueError:
        return None
    if not isinstance(note, dict) or not isinstance(note.get("pid"), int):
        return None
    return Holder(note["pid"], str(note.get("host", "?")), str(note.get("token", "")))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, by its name in Linux; "" if unknown."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return ""
    found, kind = "", ""
    real = str(path.resolve())
    for fields in mounts:
        point = fields[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found):
            found, kind = point, fields[fields.index("-") + 1]
    return kind
