"""Kernels are compiled once, by whichever process comes first; where they can't be, a reason says so."""

import ctypes
import hashlib
import multiprocessing
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from huarizo.kernels import attention as attention_kernel
from huarizo.kernels import build, dropout, int8
from huarizo.kernels.tiers import TIERS, Tier, tiers
from huarizo.model import attention
from tests.model.test_attention import boundaries, in_c, random_states, value_and_gradients

SOME_TIER = Tier(name="some", machine="x86_64", needs=frozenset(), options=("-march=some",), int8_product="of its own")
LOWER_TIER = replace(SOME_TIER, name="lower", options=("-march=lower",))


def load(name: str) -> build.Library | str:
    """As a new process would."""
    return build.load.__wrapped__(name, attention_kernel.Call)


def loaded(name: str) -> Any:
    """What `made` lets a library's functions be: its file."""
    library = load(name)
    assert isinstance(library, build.Library), library
    return library.functions


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing remembered of earlier loads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load.cache_clear()
    attention_kernel.reason_against.cache_clear()
    yield tmp_path / "cache" / "huarizo" / "kernels"
    build.load.cache_clear()
    attention_kernel.reason_against.cache_clear()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all of the PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(build, "tiers", lambda: (SOME_TIER,))
    return folder


def compiler(folder: Path, script: str) -> None:
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)


def c_compiler() -> str:
    found = next(filter(None, map(shutil.which, build.COMPILERS)), None)
    return found or pytest.skip("no C compiler")


def attend(cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    states = random_states((4, 2), int(cu_seqlens[-1]), 32, torch.float32)
    return value_and_gradients(states, torch.ones(int(cu_seqlens[-1]), 4, 32), cu_seqlens)


def test_without_a_compiler_torch_does_it(cache: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no C compiler" in load("attention") and "Install one: " in load("attention")
    assert "no C compiler" in str(attention_kernel.reason_against(torch.float32, 32))
    fallen_back = attend(boundaries([3, 70]))
    monkeypatch.setattr(attention, "_in_c", lambda *_: False)
    assert all(torch.equal(a, b) for a, b in zip(fallen_back, attend(boundaries([3, 70])), strict=True))


def test_a_broken_compiler_is_a_reason(cache: Path, programs: Path) -> None:
    compiler(programs, 'case "$1" in --version) echo 1.0;; *) echo no such flag >&2; exit 1;; esac')
    assert "no such flag" in load("attention")
    assert not list(cache.iterdir()), "nothing of it is left"


def test_a_compiler_that_makes_no_library_is_a_reason(cache: Path, programs: Path) -> None:
    compiler(programs, "exit 0")
    assert "no kernel from" in load("attention")


def test_a_compiler_that_hangs_is_a_reason(cache: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(programs, "exec sleep 60")
    monkeypatch.setattr(build, "TIME_LIMIT", 0.2)
    assert "longer than 0.2 seconds" in load("attention")


def test_an_unfit_cpu_is_a_reason(cache: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "tiers", tuple)
    assert "this CPU has no vector instructions" in load("attention")


def test_a_cache_that_cannot_be_written_is_a_reason(cache: Path, programs: Path) -> None:
    compiler(programs, "exit 0")
    cache.parent.parent.write_text("a file where a folder should be")
    assert "no kernel from" in load("attention")


def test_the_second_load_does_not_compile(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_c(torch.float32, 32)
    made = {file: file.stat() for file in cache.iterdir()}
    assert sorted(file.suffix for file in made) == [".sha256", ".so"]
    commands = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: commands.append(command) or run(command, **kwargs))
    assert not isinstance(load("attention"), str)
    assert [command[1:] for command in commands] == [["--version"]]
    assert {file: file.stat() for file in cache.iterdir()} == made


@pytest.fixture
def made(programs: Path) -> Path:
    """A compiler whose library is a few bytes, and a log of its calls."""
    log = programs / "log"
    script = f'case "$1" in --version) echo 1.0; exit;; esac; echo x >> {log}\n'
    compiler(programs, script + 'while [ "$1" != -o ]; do shift; done; printf library > "$2"')
    return log


def picky(folder: Path, refused: str) -> None:
    """A compiler that refuses an option."""
    script = (folder / "cc").read_text().removeprefix("#!/bin/sh\n")
    refuse = (
        f'case " $* " in *" {refused} "*) echo note; echo error: unknown {refused} >&2; echo a hint >&2; exit 1;; esac'
    )
    compiler(folder, f"{refuse}\n{script}")


def test_a_compiler_that_does_not_know_the_best_tier_builds_for_the_next(
    cache: Path, programs: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "tiers", lambda: (SOME_TIER, LOWER_TIER))
    monkeypatch.setattr(build, "_loaded", lambda library, call: library)
    picky(programs, "-march=some")
    library = load("attention")
    assert isinstance(library, build.Library) and (library.tier, library.openmp) == (LOWER_TIER, True)
    monkeypatch.setattr(build, "tiers", lambda: (SOME_TIER,))
    assert load("attention") == f"{programs}/cc failed: error: unknown -march=some", "the line that says why"


def test_a_compiler_without_openmp_builds_for_threads_of_its_own(
    cache: Path, programs: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "tiers", lambda: (SOME_TIER, LOWER_TIER))
    monkeypatch.setattr(build, "_loaded", lambda library, call: library)
    picky(programs, "-fopenmp")
    library = load("attention")
    assert isinstance(library, build.Library) and (library.tier, library.openmp) == (SOME_TIER, False)


def test_a_second_openmp_runtime_makes_threads_of_its_own(
    cache: Path, programs: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clang's, which is not torch's: it is never loaded, so that it is refused for each kernel."""
    script = (programs / "cc").read_text().removeprefix("#!/bin/sh\n")
    compiler(
        programs, f'case " $* " in *" -fopenmp "*) needs=libomp.so.5;; esac; {script} printf "\\0$needs\\0" >> "$2"'
    )
    opened = []
    monkeypatch.setattr(build, "_openmp_runtimes", lambda: ["/torch/lib/libgomp.so.1"])
    monkeypatch.setattr(
        build.ctypes, "CDLL", lambda file: opened.append(Path(file)) or SimpleNamespace(huarizo_call_size=Sized())
    )
    for name in ("attention", "dropout"):
        library = load(name)
        assert isinstance(library, build.Library) and not library.openmp
    assert len(opened) == 2 and not any(b"libomp" in file.read_bytes() for file in opened)


def test_a_library_that_can_not_be_loaded_is_made_in_another_way(
    cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "tiers", lambda: (SOME_TIER, LOWER_TIER))

    def refuse(file: str) -> None:
        raise OSError("libmissing.so: cannot open shared object file")

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    assert load("attention") == "libmissing.so: cannot open shared object file"
    assert made.read_text() == "x\n" * 4, "two tiers, each with OpenMP and without"


def test_int8_needs_a_tier_that_multiplies_it(cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "tiers", lambda: (next(tier for tier in TIERS if tier.name == "neon"),))
    assert int8.library() == "no int8 product for this CPU (neon)"
    assert not made.exists(), "nothing is compiled"


@pytest.mark.parametrize("damage", ["the library", "the digest", "no digest", "cut"])
def test_a_damaged_library_is_made_anew(cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(build, "_loaded", lambda library, call: library)
    library = loaded("attention")
    assert loaded("attention") == library and made.read_text() == "x\n"
    digest = library.with_suffix(".sha256")
    if damage == "the library":
        library.write_bytes(b"another")
    elif damage == "the digest":
        digest.write_bytes(b"\xff")
    elif damage == "no digest":
        digest.unlink()
    else:
        library.write_bytes(b"")
    assert loaded("attention") == library and made.read_text() == "x\nx\n"
    assert library.read_bytes() == b"library"
    assert loaded("attention") == library and made.read_text() == "x\nx\n"


@pytest.mark.parametrize("above", [False, True], ids=["the folder", "the one above"])
def test_what_others_could_write_is_not_loaded(
    cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch, above: bool
) -> None:
    monkeypatch.setattr(build, "_loaded", lambda library, call: library)
    library = loaded("attention")
    (cache.parent if above else cache).chmod(0o775)
    library.write_bytes(b"planted")
    library.with_suffix(".sha256").write_text(hashlib.sha256(b"planted").hexdigest())
    assert loaded("attention").read_bytes() == b"library"
    assert not (cache.stat().st_mode | cache.parent.stat().st_mode) & 0o022


def test_another_users_folder_is_a_reason(cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.os, "getuid", lambda: 12345)
    assert "belongs to another user" in load("attention")
    assert not made.exists(), "nothing is compiled there"


def test_another_source_is_another_library(cache: Path, tmp_path: Path) -> None:
    in_c(torch.float32, 32)
    other = tmp_path / "attention.c"
    other.write_text("int one(void) { return 1; }")
    library = build._compiled(other, c_compiler(), build.FLAGS)
    assert len(list(cache.glob("*.so"))) == 2 and library.parent == cache


def test_no_second_openmp_runtime_is_loaded() -> None:
    in_c(torch.float32, 32)
    code = "from huarizo.kernels import attention, build; build.load('attention', attention.Call); print(len(build._openmp_runtimes()))"
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "1"


def _build_and_attend() -> bytes:
    assert attention_kernel.reason_against(torch.float32, 32) is None
    return b"".join(t.numpy().tobytes() for t in attend(boundaries([3, 70])))


def test_two_processes_build_at_once(cache: Path) -> None:
    in_c(torch.float32, 32)
    build.load.cache_clear()
    attention_kernel.reason_against.cache_clear()
    shutil.rmtree(cache)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = (pool.apply_async(_build_and_attend) for _ in range(2))
        assert first.get(300) == second.get(300) == _build_and_attend()
    assert sorted(file.suffix for file in cache.iterdir()) == [".sha256", ".so"]


class Sized:
    """A library's function that gives the size of attention's Call."""

    restype: Any = None

    def __call__(self) -> int:
        return ctypes.sizeof(attention_kernel.Call)


class Twin(ctypes.Structure):
    _fields_ = (("rows", ctypes.c_int64), ("threads", ctypes.c_int32))


@pytest.mark.parametrize("size", [16, 12, 24])
def test_a_library_whose_calls_have_another_size_is_refused(cache: Path, tmp_path: Path, size: int) -> None:
    source = tmp_path / "other.c"
    source.write_text(f"#include <stdint.h>\nint64_t huarizo_call_size(void) {{ return {size}; }}")
    library = build._compiled(source, c_compiler(), build.FLAGS)
    if size == ctypes.sizeof(Twin):
        assert isinstance(build._loaded(library, Twin), ctypes.CDLL)
    else:
        with pytest.raises(build._Unusable, match=f"Call has {size} bytes in the library and 16 in its binding"):
            build._loaded(library, Twin)


@pytest.mark.parametrize("binding", [attention_kernel, dropout, int8], ids=lambda binding: binding.__name__)
def test_the_fields_of_a_binding_lie_where_c_has_them(binding: ModuleType, tmp_path: Path) -> None:
    source = Path(binding.__file__).with_suffix(".c")
    lines = [f'#include "{source}"', "#include <stddef.h>"]
    for struct in {kind for _, kind in binding.Call._fields_ if issubclass(kind, ctypes.Structure)} | {binding.Call}:
        lines.append(f'_Static_assert(sizeof({struct.__name__}) == {ctypes.sizeof(struct)}, "size");')
        for name, kind in struct._fields_:
            at = f"offsetof({struct.__name__}, {name}) == {getattr(struct, name).offset}"
            size = f"sizeof((({struct.__name__} *)0)->{name}) == {ctypes.sizeof(kind)}"
            lines.append(f'_Static_assert({at} && {size}, "{name}");')
    checked = tmp_path / "checked.c"
    checked.write_text("\n".join(lines))
    tier = next(iter(tiers()), None) or pytest.skip("this CPU has no tier")
    command = [c_compiler(), *tier.options, *build.OWN_THREADS, "-fsyntax-only", str(checked)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
