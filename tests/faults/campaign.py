"""Disturbs runs and finishes them: kills at random instants, at each file operation, and again while they recover;
disks that are full or gone; signals; damaged files.

    python -m tests.faults.campaign --random 200 --operations -1 --twice 50 --disk 1 --signals 1 --damage 300

Each case has to end with the bytes of the undisturbed run, or with a message. `--operations -1` means every one. The last line of stdout
is one JSON object with the numbers of cases; a case that fails ends it with exit code 1.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import damage, disturb, signalled
from tests.faults.children import (
    Lab,
    check_after_kill,
    ended,
    kill_after,
    make_lab,
    one_case,
    random_kill,
    start,
)
from tests.faults.operations import kill_at

DEFAULTS = {
    "random": 0,
    "operations": 0,
    "twice": 0,
    "disk": 0,
    "signals": 0,
    "damage": 0,
    "seed": 1,
    "jobs": os.cpu_count() or 1,
}
Case = tuple[str, Callable[[Lab, Path], object]]


def cases(lab: Lab, options: argparse.Namespace) -> Iterator[Case]:
    """Names of cases, and what each does to a run."""
    recipe = lab.folder / "recipe.yaml"
    for number in range(options.random):
        yield f"random-{number}", lambda lab, run, n=number: one_case(lab, run, random_kill(lab, options.seed + n))
    numbers = list(range(1, lab.operations + 1))
    if options.operations >= 0:
        numbers = random.Random(options.seed).sample(numbers, min(options.operations, len(numbers)))
    for number in numbers:
        for half in (False, True):
            kill = kill_at(number, half)
            yield (
                f"operation-{number}-{half:d}",
                lambda lab, run, k=kill: one_case(lab, run, lambda run: ended(start(run, recipe, k))),
            )
    for number in range(options.twice):
        kill_twice = _twice(lab, options.seed + number)
        yield f"twice-{number}", lambda lab, run, k=kill_twice: one_case(lab, run, k)
    if options.disk:
        yield from disturb.CASES.items()
    if options.signals:
        yield from signalled.CASES.items()
    if options.damage:
        damage.prepare(lab)
        yield from damage.cases(lab, options.damage, options.seed)


def _twice(lab: Lab, seed: int) -> Callable[[Path], None]:
    def kill(run: Path) -> None:
        moments = random.Random(seed)
        for _ in range(2):
            if not (run / "run" / "loss.png").is_file():
                kill_after(start(run, lab.folder / "recipe.yaml"), moments.uniform(0.2, 1) * lab.seconds)
                check_after_kill(run)

    return kill


def work(lab: Lab, mine: list[Case], failures: Path) -> None:
    for name, case in mine:
        run = lab.folder / name
        try:
            case(lab, run)
            shutil.rmtree(run)
        except Exception:
            with failures.open("a") as file:
                file.write(f"{name}: {traceback.format_exc()}\n")


def main() -> int:
    """Run the campaign; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="huarizo-faults-") as folder:
        lab, failures = make_lab(Path(folder) / "lab", options.precision), Path(folder) / "failures"
        todo = list(cases(lab, options))
        workers = []
        for worker in range(options.jobs):
            if (pid := os.fork()) == 0:
                work(lab, todo[worker :: options.jobs], failures)
                os._exit(0)
            workers.append(pid)
        died = [pid for pid in workers if ended(pid)]
        text = failures.read_text() if failures.is_file() else ""
        tally = lab.folder / "exit codes"
        codes = Counter(tally.read_text().split()) if tally.is_file() else {}
    print(text, file=sys.stderr)
    failed = text.count("Traceback (most recent call last)") + len(died)
    counts = {"cases": len(todo), "random": options.random, "operations": lab.operations, "twice": options.twice}
    counts |= {"damage": options.damage, "exit codes after damage": dict(sorted(codes.items()))} if codes else {}
    counts |= {"precision": options.precision, "failed": failed, "seconds": round(time.monotonic() - began)}
    print(json.dumps(counts))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
