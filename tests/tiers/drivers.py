"""Kernels of every tier on this machine: natively where its CPU has the tier, else under emulation.

A kernel and `driver.c` become a program that serves calls over its standard input and output. `Driver` stands in for
the loaded library of a binding, so the bindings' own functions are called on any tier. AVX512 and its kin are emulated
by plain C (emulated/immintrin.h), Arm's instructions by qemu. With sanitizers a call's buffers have exactly the size
that the kernel may touch.
"""

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest import mock

from huarizo.kernels import attention, build, dropout, int8
from huarizo.kernels.tiers import TIERS, Tier, tiers

HERE = Path(__file__).parent
FUNCTIONS = {
    int8: ("int8_quantise", "int8_forward", "int8_backward"),
    attention: ("attention_forward", "attention_backward"),
    dropout: ("dropout", "dropout_down", "dropout_down_backward"),
}
FLAGS = (*(flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")), *build.OWN_THREADS)
QUICK = (*FLAGS, "-O0")
SANITIZED = (*FLAGS, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
MACROS = {
    "avx2": "__AVX2__", "avx_vnni": "__AVXVNNI__", "avx512f": "__AVX512F__", "avx512_vnni": "__AVX512VNNI__",
    "avx512_bf16": "__AVX512BF16__",
}  # fmt: skip
"""By which macro the kernels see that they may use a CPU's instructions."""


class Failure(Exception):
    """A program that doesn't compile, or that ended during a call; with what it printed."""


@dataclass(frozen=True)
class Way:
    """How a tier's programs are compiled and run here."""

    compiler: tuple[str, ...]
    """With the options of the tier."""
    runner: tuple[str, ...]
    """What the program's command begins with."""
    emulation: str | None
    """What stands for the CPU; None natively."""


def way_of(tier: Tier) -> Way | str:
    """How to run a tier on this machine, or why it can't be."""
    native = next(filter(None, map(shutil.which, build.COMPILERS)), None)
    if native is None:
        return f"no C compiler: {build.INSTALL}"
    if tier in tiers():
        return Way((native, *tier.options), (), None)
    if tier.machine == "x86_64":
        known = tiers()[-1].options if tiers() else ()
        macros = [f"-D{macro}" for flag, macro in MACROS.items() if flag in tier.needs]
        return Way((native, *known, "-w", "-Wno-psabi", "-DEMULATED", *macros, f"-I{HERE / 'emulated'}"), (), "plain C")
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        return "no compiler or emulator for aarch64: apt install gcc-aarch64-linux-gnu qemu-user"
    if reason := _reason_against_static(compiler):
        return reason
    return Way((compiler, "-static", *tier.options), (emulator, "-cpu", "max"), "qemu")


@functools.cache
def _reason_against_static(compiler: str) -> str | None:
    """Why a compiler can't make static programs; None if it can."""
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-static", "-x", "c", "-", "-o", f"{folder}/program", "-lm"]
        done = subprocess.run(command, input="int main(void) { return 0; }", capture_output=True, text=True)
    return None if done.returncode == 0 else f"{compiler} makes no programs: apt install libc6-dev-arm64-cross"


def _sizes(call: Any, function: str) -> dict[str, int]:
    """The bytes from each pointer of a call on that a function may touch."""
    element = 2 if call.bf16 else 4
    if function.startswith("attention"):
        of = {"cu_seqlens": 4 * (call.examples + 1), "lse": 4 * call.heads * call.tokens, "sinks": 4 * call.heads}
        for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v"):
            heads, tensor = call.kv_heads if name in attention.OF_KEYS else call.heads, getattr(call, name)
            last = (heads - 1) * tensor.head + (call.tokens - 1) * tensor.token
            of[name] = last + call.size * element if call.tokens else 0
        return of
    backward = function == "int8_backward"
    width = call.outputs if backward else call.inputs
    x = (call.rows - 1) * call.x_stride + width * element if call.rows else 0
    if function.startswith("dropout"):
        return {
            "x": x, "places": 4 * call.rows, "weight": 4 * call.rank * call.inputs,
            "h": call.rows * call.rank * element, "out": call.rows * call.inputs * element,
            "grad": 4 * call.rank * call.inputs,
        }  # fmt: skip
    inputs, outputs, words = -(-call.inputs // 32) * 32, -(-call.outputs // 32) * 32, -(-call.floats * element // 4)
    return {
        "x": x, "quantised": call.rows * call.quantised_stride, "row_scale": 4 * call.rows, "row_start": 4 * call.rows,
        "weight": inputs * outputs, "scale": 4 * outputs, "factor": 4 * call.inputs, "float_channels": 8 * call.floats,
        "float_weight": outputs * words * 4, "bias": call.outputs * element,
        "h": call.rows * call.rank * element, "up": 4 * call.outputs * call.rank,
        "out": call.rows * (call.inputs if backward else call.outputs) * element,
    }  # fmt: skip


def _pointers(call: ctypes.Structure) -> Iterator[tuple[str, int, int]]:
    """Name, offset and address of each pointer of a call that isn't NULL."""
    for name, kind, *_ in call._fields_:
        offset, value = getattr(type(call), name).offset, getattr(call, name)
        if kind is attention.Tensor:
            offset, value = offset + kind.data.offset, value.data
        if kind in (ctypes.c_void_p, attention.Tensor) and value:
            yield name, offset, value


class Driver:
    """A running program. It has the functions of a loaded library, which take `byref` of a call."""

    def __init__(self, command: list[str], functions: tuple[str, ...], call: type[ctypes.Structure]) -> None:
        self._functions = functions
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        self._program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed,
            env={**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
        )  # fmt: skip
        (size,) = struct.unpack("<q", self._read(8))
        if size != ctypes.sizeof(call):
            raise Failure(f"Call has {size} bytes in the program and {ctypes.sizeof(call)} in its binding")

    def __getattr__(self, name: str) -> Callable[[Any], int]:
        function = name.removeprefix("huarizo_")
        number = self._functions.index(function)
        return lambda reference: self._call(number, function, reference._obj)

    def _call(self, number: int, function: str, call: ctypes.Structure) -> int:
        sizes = _sizes(call, function)
        buffers = [(offset, address, sizes[name]) for name, offset, address in _pointers(call)]
        parts = [struct.pack("<ii", number, len(buffers)), bytes(call)]
        for offset, address, size in buffers:
            parts += [struct.pack("<qqq", offset, size, address % 16), ctypes.string_at(address, size)]
        try:
            self._program.stdin.write(b"".join(parts))  # pyright: ignore
            self._program.stdin.flush()  # pyright: ignore
        except BrokenPipeError:
            raise Failure(self._report()) from None
        (status,) = struct.unpack("<i", self._read(4))
        for _, address, size in buffers:
            ctypes.memmove(address, self._read(size), size)
        return status

    def _read(self, size: int) -> bytes:
        data = self._program.stdout.read(size)  # pyright: ignore
        if len(data) != size:
            raise Failure(self._report())
        return data

    def _report(self) -> str:
        code = self._program.wait()
        self._printed.seek(0)
        return f"the program ended with {code}:\n{self._printed.read().decode(errors='replace')}"

    def close(self) -> None:
        """End the program.

        Raises:
            Failure: it doesn't end well, for example because memory leaked.
        """
        self._program.stdin.close()  # pyright: ignore
        if self._program.wait() != 0:
            raise Failure(self._report())


def _compile(way: Way, kernel: ModuleType, flags: tuple[str, ...], folder: Path) -> list[str]:
    """The command of a kernel's program."""
    name = kernel.__name__.rpartition(".")[2]
    source = Path(str(kernel.__file__)).with_name(f"{name}.c")
    level_1 = [flag.replace("-O3", "-O1") for flag in flags]  # enough for emulation, and compiled in less time
    command = [
        *way.compiler, *(level_1 if way.emulation == "plain C" else flags), f'-DKERNEL="{source}"', "-DFUNCTIONS=" + " ".join(f"FUNCTION({f})" for f in FUNCTIONS[kernel]),
        str(HERE / "driver.c"), "-o", str(folder / name), "-lm",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{' '.join(command)}\n{done.stderr}")
    return [*way.runner, str(folder / name)]


def kernels_of(tier: Tier) -> list[ModuleType]:
    """The kernels that a tier has."""
    return [kernel for kernel in FUNCTIONS if kernel is not int8 or tier.int8_product]


@contextmanager
def on(tier: Tier, way: Way, flags: tuple[str, ...] = FLAGS) -> Iterator[None]:
    """Inside the block the bindings call programs of this tier, compiled with `flags`.

    Raises:
        Failure: a program can't be compiled, or ends with an error.
    """
    kernels = kernels_of(tier)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            commands = list(pool.map(lambda kernel: _compile(way, kernel, flags, Path(folder)), kernels))
        drivers = [
            Driver(command, FUNCTIONS[kernel], kernel.Call) for kernel, command in zip(kernels, commands, strict=True)
        ]
        for kernel, driver in zip(kernels, drivers, strict=True):
            library = build.Library(cast(ctypes.CDLL, driver), tier, openmp=False)
            stack.enter_context(mock.patch.object(kernel, "library", lambda found=library: found))
            stack.enter_context(mock.patch.object(kernel, "reason_against", lambda *_: None))
        yield
        for driver in drivers:
            driver.close()


def native() -> Tier | None:
    """The lowest tier of this CPU."""
    return next((tier for tier in reversed(TIERS) if tier in tiers()), None)
