"""Compiles a C source of this package at its first use and loads it; says in words why, where that can't be.

The library is made for this very CPU by the machine's own compiler and kept in the cache folder under a name that
changes with all that it depends on, so no binary is shipped and none is used where it doesn't belong. Its digest lies
beside it, in a folder that nobody else can write: what was damaged is made anew, and what others may have put there is
not loaded. Every kernel is beside a way in plain torch: a reason instead of a library is no error.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401  # and with it the OpenMP runtime to share

from huarizo.errors import MachineError
from huarizo.files import sha256_of, write_whole
from huarizo.host import cache_folder, cpu_flags

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
TIME_LIMIT = 120  # seconds for one compilation
REQUIRED = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})  # of every kernel


@functools.cache
def load(name: str, call: type[ctypes.Structure]) -> ctypes.CDLL | str:
    """The library made from `{name}.c`, compiled if it isn't in the cache, or the reason why there is none.

    call: the binding's twin of the struct that the library's functions take, which must have its size.
    """
    if missing := REQUIRED - cpu_flags():
        return f"this CPU has no {', '.join(sorted(missing))}"
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return f"no C compiler: none of {', '.join(COMPILERS)} is on the PATH"
    try:
        return _loaded(_compiled(Path(__file__).with_name(f"{name}.c"), compiler), call)
    except subprocess.TimeoutExpired:
        return f"{compiler} took longer than {TIME_LIMIT} seconds"
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {(error.stderr or '').strip()[-500:] or error.returncode}"
    except OSError as error:
        return f"no kernel from {compiler}: {error}"


def _compiled(source: Path, compiler: str) -> Path:
    """The library's file: as an earlier process left it, or new and put in its place in one step."""
    folder = cache_folder() / "kernels"
    _make_own(folder)
    # the runtime that torch has loaded comes first, so that the compiler's own isn't needed
    flags = [*FLAGS, "-Wl,--as-needed", *_openmp_runtimes()[:1]]
    version = _run([compiler, "--version"], folder)
    sources = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    parts = (*sources, *flags, version, *sorted(cpu_flags()))
    library = folder / f"{source.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"
    if not _is_whole(library):
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as made:
            new = Path(made) / library.name
            _run([compiler, *flags[: len(FLAGS)], str(source), "-o", str(new), *flags[len(FLAGS) :], "-lm"], Path(made))
            content = new.read_bytes()
        # another process may do the same, with the same bytes or others: the digest is of whichever library it follows
        _put(library, content)
        _put(_digest_of(library), hashlib.sha256(content).hexdigest())
    return library


def _put(path: Path, content: bytes | str) -> None:
    try:
        write_whole(path, content)
    except MachineError as error:
        raise OSError(str(error)) from None


def _digest_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_whole(library: Path) -> bool:
    """Whether the library is there, as it was written."""
    try:
        return sha256_of(library) == _digest_of(library).read_text()
    except (OSError, ValueError):
        return False


def _make_own(folder: Path) -> None:
    """Make the folder one that nobody else can write, or put another in the place of; what others may have put goes.

    Raises:
        OSError: it, or the folder above, is another user's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not hasattr(os, "getuid"):
        return
    for place in (folder.parent, folder):
        found = place.stat()
        if found.st_uid != os.getuid():
            raise OSError(f"{place} belongs to another user. Set XDG_CACHE_HOME to a folder of your own")
        if found.st_mode & OTHERS_WRITE:
            place.chmod(stat.S_IMODE(found.st_mode) & ~OTHERS_WRITE)
            for library in folder.glob("*.so"):
                library.unlink()


def _run(command: list[str], scratch: Path) -> str:
    """What the command prints. Of the environment it sees where programs lie and where to put what it needs itself."""
    path = os.pathsep.join((str(Path(command[0]).parent), os.defpath))
    environment = {"PATH": path, "LC_ALL": "C", "TMPDIR": str(scratch)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=TIME_LIMIT, errors="replace"
    ).stdout


def _loaded(library: Path, call: type[ctypes.Structure]) -> ctypes.CDLL | str:
    """The library, unless its calls have another size than the binding's, or it brings an OpenMP runtime of its own.

    Two OpenMP runtimes fight over the cores.
    """
    before = _openmp_runtimes()
    loaded = ctypes.CDLL(str(library))
    if more := sorted(set(_openmp_runtimes()) - set(before)):
        return f"the compiler uses another OpenMP runtime than torch: {', '.join(more)}"
    size = loaded.huarizo_call_size
    size.restype = ctypes.c_int64
    if size() != ctypes.sizeof(call):
        return f"a call has {size()} bytes for the library and {ctypes.sizeof(call)} for its binding"
    return loaded


def _openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes that this process has loaded, torch's own first."""
    found = set(re.findall(r"/.*/lib(?:gomp|i?omp)[^/\n]*\.so[^/\n]*", Path("/proc/self/maps").read_text()))
    return sorted(found, key=lambda file: ("/torch/" not in file, file))
