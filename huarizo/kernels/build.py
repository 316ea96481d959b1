"""Compiles a C source of this package on first use and loads it, or returns the reason why it can't.

The machine's own compiler builds the library for the best tier of this CPU (tiers.py) that it knows. It is cached under
a name that is a hash of everything it depends on, so no binary is shipped and none is used on the wrong machine. Its
digest is stored beside it, in a folder that only this user can write: a damaged library is built again, and one that
someone else may have put there is not loaded. Every kernel has an equivalent in plain torch, so a missing library is
not an error.

The kernels run on the threads of torch's OpenMP runtime. With a compiler that can't use that one (clang on Linux,
Apple's), they start threads of their own in each call, which costs some 50 microseconds (threads.h).
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch  # loads the OpenMP runtime to share

from huarizo.errors import MachineError
from huarizo.files import sha256_of, write_whole
from huarizo.host import cache_folder
from huarizo.kernels.tiers import Tier, tiers

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")
OPENMP, OWN_THREADS = ("-fopenmp",), ("-pthread", "-Wno-unknown-pragmas")
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
INSTALL = "xcode-select --install" if sys.platform == "darwin" else "apt install g++, or dnf install gcc-c++"
OPENMP_RUNTIME = re.compile(rb"lib(?:gomp|i?omp)[\w-]*(?:\.[\w-]+)*")
TIME_LIMIT = 120  # seconds for one compilation


@dataclass(frozen=True)
class Library:
    """A loaded library of kernels."""

    functions: ctypes.CDLL
    tier: Tier
    openmp: bool
    """Whether it runs on torch's threads; otherwise it starts its own in each call."""


class _Unusable(Exception):
    """A library that was compiled but can't be used."""


@functools.cache
def load(name: str, call: type[ctypes.Structure], multiplies_int8: bool = False) -> Library | str:
    """The library compiled from `{name}.c`, from the cache if possible, or the reason why there is none.

    call: the binding's counterpart of the struct that the library's functions take; both must have the same size.
    multiplies_int8: whether it needs a tier with an int8 product.
    """
    if not tiers():
        return "this CPU has no vector instructions that the kernels know"
    able = [tier for tier in tiers() if tier.int8_product or not multiplies_int8]
    if not able:
        return f"no int8 product for this CPU ({tiers()[0].name})"
    compiler = find_compiler()
    if compiler is None:
        return f"no C compiler: none of {', '.join(COMPILERS)} is on the PATH. Install one: {INSTALL}"
    reason = ""
    for tier in able:
        for threads in (OPENMP, OWN_THREADS):
            try:
                file = _compiled(Path(__file__).with_name(f"{name}.c"), compiler, (*FLAGS, *tier.options, *threads))
                return Library(_loaded(file, call), tier, threads == OPENMP)
            except subprocess.TimeoutExpired:
                return f"{compiler} took longer than {TIME_LIMIT} seconds"
            except subprocess.CalledProcessError as error:
                reason = reason or f"{compiler} failed: {_first_error(error.stderr or '') or error.returncode}"
            except _Unusable as error:
                reason = reason or str(error)
            except OSError as error:
                return f"no kernel from {compiler}: {error}"
    return reason


def find_compiler() -> str | None:
    """The C compiler that builds the kernels; None if there is none."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _first_error(printed: str) -> str:
    """The line of a compiler's output that says what is wrong; "" if it printed nothing."""
    lines = printed.strip().splitlines() or [""]
    return next((line for line in lines if "error" in line), lines[-1]).strip()[:500]


def _compiled(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    """The library's file, from the cache or newly compiled and moved into place atomically."""
    folder = cache_folder() / "kernels"
    _make_own(folder)
    # linked to torch's OpenMP runtime first, so that the compiler's own isn't needed
    linked = [*(["-Wl,--as-needed", *_openmp_runtimes()[:1]] if "-fopenmp" in flags else []), "-lm"]
    version = _run([compiler, "--version"], folder)
    sources = [file.read_text() for file in (source, *sorted(source.parent.rglob("*.h")))]
    digest = hashlib.sha256(chr(0).join((*sources, *flags, *linked, version)).encode()).hexdigest()
    library = folder / f"{source.stem}-{digest[:32]}.so"
    if not _is_whole(library):
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as made:
            new = Path(made) / library.name
            _run([compiler, *flags, str(source), "-o", str(new), *linked], Path(made))
            content = new.read_bytes()
        # another process may do the same, even with other bytes: each writes its library, then that library's digest
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
    """Whether the library exists and matches its digest."""
    try:
        return sha256_of(library) == _digest_of(library).read_text()
    except (OSError, ValueError):
        return False


def _make_own(folder: Path) -> None:
    """Make the folder and its parent writable for this user only. Libraries that others may have written are removed.

    Raises:
        OSError: the folder or its parent belongs to another user.
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
                library.unlink(missing_ok=True)  # other threads do the same


def _run(command: list[str], scratch: Path) -> str:
    """What the command prints. Its environment has only a PATH, a locale and a folder for temporary files."""
    path = os.pathsep.join((str(Path(command[0]).parent), os.defpath))
    environment = {"PATH": path, "LC_ALL": "C", "TMPDIR": str(scratch)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=TIME_LIMIT, errors="replace"
    ).stdout


def _loaded(library: Path, call: type[ctypes.Structure]) -> ctypes.CDLL:
    """Load the library.

    Raises:
        _Unusable: it can't be loaded; its `Call` has another size than the binding's; or it needs another OpenMP
            runtime than torch, which would compete with torch's for the cores. Such a library is not loaded.
    """
    needed = {name.decode() for name in OPENMP_RUNTIME.findall(library.read_bytes())}
    if other := sorted(needed - {Path(file).name for file in _openmp_runtimes()[:1]}):
        raise _Unusable(f"the compiler uses another OpenMP runtime than torch: {', '.join(other)}")
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise _Unusable(str(error)) from None
    size = loaded.huarizo_call_size
    size.restype = ctypes.c_int64
    if size() != ctypes.sizeof(call):
        raise _Unusable(f"Call has {size()} bytes in the library and {ctypes.sizeof(call)} in its binding")
    return loaded


def _openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes that this process has loaded, torch's own first."""
    if sys.platform == "darwin":
        return sorted(map(str, (Path(torch.__file__).parent / "lib").glob("libomp*.dylib")))
    found = set(re.findall(r"/.*/lib(?:gomp|i?omp)[^/\n]*\.so[^/\n]*", Path("/proc/self/maps").read_text()))
    return sorted(found, key=lambda file: ("/torch/" not in file, file))
