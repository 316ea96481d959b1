"""Runs that are killed and resumed end byte for byte as if nothing had happened; the long form is `make faults`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = ["--random", "4", "--operations", "5", "--twice", "2", "--disk", "1", "--damage", "14"]
FEW = ["--random", "2", "--operations", "2", "--twice", "1"]
SIGNALS = ["--signals", "1"]
LONG = ["--random", "200", "--operations", "-1", "--twice", "50", "--disk", "1", "--damage", "300"]


@pytest.mark.parametrize(
    ("precision", "how_often"),
    [("int8", SHORT), ("bf16", FEW), ("fp32", FEW), ("fp32", SIGNALS), pytest.param("fp32", LONG, marks=pytest.mark.slow)],
    ids=["int8", "bf16", "fp32", "signals", "fp32-long"],
)  # fmt: skip
def test_killed_runs_end_as_the_undisturbed_one(precision: str, how_often: list[str]) -> None:
    command = [sys.executable, "-m", "tests.faults.campaign", *how_often, "--precision", precision]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=5400, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == 0
