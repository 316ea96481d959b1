"""A child process that reads foreign text: its limits, Ctrl-C, threads, and its end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from huarizo.sandbox.worker import FailedError, RefusedError, TooCostlyError, Worker

ROOT = Path(__file__).parents[2]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = 256 * 2**20


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("templates", MEMORY)
    yield made
    made.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_child_does_all_jobs(worker: Worker) -> None:
    assert worker.call("prompt", 5, template="{{ a }}", a="가\ud800\0") == "가\ud800\0"
    first = worker.pid
    assert worker.call("prompt", 5, template="{{ a }}!", a=1) == "1!"
    assert worker.pid == first is not None


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_closed_worker_leaves_no_socket_open(worker: Worker) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    worker.call("prompt", 5, template="")
    worker.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("template", "error"),
    [(ENDLESS, TooCostlyError), ("{{ 'a' * 10**10 }}", TooCostlyError), ("{{ 9**(9**9) }}", TooCostlyError),
     ("{{ missing }}", RefusedError), ("{{ ", RefusedError), ("{{ 1/0 }}", FailedError), ("{{ " + "(" * 9999, FailedError),
     ("{{ 'a' * 300000000 }}", TooCostlyError)],
    ids=range(8),
)  # fmt: skip
def test_whatever_a_job_does_the_next_one_works(worker: Worker, template: str, error: type[Exception]) -> None:
    worker.call("prompt", 5, template="")
    with pytest.raises(error):
        worker.call("prompt", 0.3, template=template)
    assert worker.call("prompt", 5, template="{{ a }}", a="b") == "b"


def test_limits_hold_in_any_thread(worker: Worker) -> None:
    errors = []

    def ask() -> None:
        try:
            worker.call("prompt", 0.3, template=ENDLESS)
        except TooCostlyError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == ["more than 0.3 seconds"] * 2


def test_a_child_that_was_killed_is_started_anew(worker: Worker) -> None:
    worker.call("prompt", 5, template="")
    first = worker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    assert worker.call("prompt", 5, template="a") == "a"
    assert worker.pid not in (None, first)
    worker.close()
    assert worker.pid is None


def run(code: str) -> subprocess.Popen[str]:
    head = "from huarizo.sandbox.worker import Worker\nworker = Worker('templates', 2**28)\nworker.call('prompt', 5, template='')\n"
    head += f"ENDLESS = {ENDLESS!r}\nprint(worker.pid, flush=True)\n"
    return subprocess.Popen([sys.executable, "-c", head + code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def gone(pid: int) -> bool:
    for _ in range(500):
        if not alive(pid):
            return True
        time.sleep(0.02)
    return False


def test_ctrl_c_ends_a_job_at_once_and_the_child_with_it() -> None:
    code = (
        "try: worker.call('prompt', 500, template=ENDLESS)\nexcept KeyboardInterrupt: print('interrupted', flush=True)"
    )
    with run(code) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        parent.send_signal(signal.SIGINT)
        assert parent.communicate(timeout=60)[0] == "interrupted\n"
    assert gone(pid)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
@pytest.mark.parametrize("code", ["input()", "worker.call('prompt', 1, template=ENDLESS)"], ids=["idle", "busy"])
def test_a_child_does_not_outlive_its_parent(code: str) -> None:
    with run(code) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.1)
        parent.kill()
    assert gone(pid)
