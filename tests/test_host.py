"""What the operating system says of the CPU: the same flags on Linux and macOS, on x86 and ARM."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from huarizo import host

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu sse2 fma f16c avx2 avx512f avx512_vnni
vmx flags\t: vnmi avx_of_vmx

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
PI = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd0b

Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
INTEL_MAC = """machdep.cpu.brand_string: Intel(R) Xeon(R) W-3223 CPU @ 3.50GHz
machdep.cpu.features: FPU SSE4.2 FMA F16C AVX1.0
machdep.cpu.leaf7_features: BMI1 AVX2 AVX512F AVX512BW AVX512VNNI
"""
APPLE = """machdep.cpu.brand_string: Apple M2
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_SME: 0
"""


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    host.cpu_flags.cache_clear()
    host._sysctl.cache_clear()
    yield
    host.cpu_flags.cache_clear()
    host._sysctl.cache_clear()


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(cpuinfo: str) -> None:
        read = Path.read_text
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(
            Path, "read_text", lambda self, **kw: cpuinfo if str(self) == "/proc/cpuinfo" else read(self, **kw)
        )

    return use


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    def use(machine: str, printed: str) -> None:
        def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
            assert command[0] == "/usr/sbin/sysctl"
            return subprocess.CompletedProcess(command, 1, printed, "sysctl: unknown oid 'hw.optional.arm'")

        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(subprocess, "run", run)

    return use


def test_an_x86_cpu_on_linux(linux: Callable[[str], None]) -> None:
    linux(XEON)
    assert host.cpu_flags() == {"fpu", "sse2", "fma", "f16c", "avx2", "avx512f", "avx512_vnni"}
    assert host.cpu_name() == "Intel(R) Xeon(R) Processor (avx2, avx512_vnni, avx512f)"


def test_an_arm_cpu_on_linux(linux: Callable[[str], None]) -> None:
    linux(PI)
    assert host.cpu_flags() >= {"asimd", "asimddp"} and "i8mm" not in host.cpu_flags()
    assert host.cpu_name() == "Cortex-A76 (asimd, asimddp)"


def test_an_arm_core_without_a_known_name(linux: Callable[[str], None]) -> None:
    linux(PI.replace("0xd0b", "0xd99"))
    assert host.cpu_name() == "ARM core 0xd99 of maker 0x41 (asimd, asimddp)"


def test_an_intel_mac(mac: Callable[[str, str], None]) -> None:
    mac("x86_64", INTEL_MAC)
    assert host.cpu_flags() >= {"fma", "f16c", "avx2", "avx512f", "avx512bw", "avx512_vnni"}
    assert host.cpu_name().startswith("Intel(R) Xeon(R) W-3223 CPU @ 3.50GHz (avx2, ")


def test_an_apple_cpu(mac: Callable[[str, str], None]) -> None:
    mac("arm64", APPLE)
    assert host.cpu_flags() == {"asimd", "asimddp", "i8mm", "bf16"}
    assert host.cpu_name() == "Apple M2 (asimd, asimddp, bf16, i8mm)"
    host.cpu_flags.cache_clear()
    host._sysctl.cache_clear()
    mac("arm64", APPLE.replace("I8MM: 1", "I8MM: 0").replace("hw.optional.arm.FEAT_BF16: 1\n", ""))
    assert host.cpu_flags() == {"asimd", "asimddp"}, "an M1"


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_system_that_says_nothing(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(subprocess, "run", absent)
    assert host.cpu_flags() == frozenset() and host.cpu_name() == "riscv64"


def test_it_does_not_import_torch() -> None:
    code = "import sys; from huarizo import host; host.cpu_name(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def waiting(**environment: str) -> str:
    """What torch's OpenMP says of its waiting threads, with these environment variables."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ended = subprocess.run(
        [sys.executable, "-c", "import huarizo, torch"],
        env={**inherited, "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return next((line.strip() for line in ended.stderr.splitlines() if "GOMP_SPINCOUNT" in line), "")


def test_idle_threads_sleep_soon_unless_the_user_says_otherwise() -> None:
    if not waiting():
        pytest.skip("torch's OpenMP is not GNU's")
    assert f"'{host.SPINS}'" in waiting()
    assert "'77'" in waiting(GOMP_SPINCOUNT="77")
    assert f"'{host.SPINS}'" not in waiting(OMP_WAIT_POLICY="active")
