"""A child of the driver: its answers, its errors, its silence and its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher import child as child_module
from launcher.child import Child, ChildEnded, tell
from tests.support.waiting import wait_for
from trainer.errors import InputError

LIMIT_S = 60.0


class Awkward(Exception):
    """An exception that cannot be made again from its text."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Served:
    def __init__(self) -> None:
        self._opened = threading.Event()

    def add(self, one: int, two: int) -> int:
        tell(f"adding {one}")
        return one + two

    def fail(self) -> None:
        raise InputError("no such file")

    def fail_awkwardly(self) -> None:
        raise Awkward(1, 2)

    def wait(self) -> None:
        self._opened.wait()

    def open(self) -> None:
        self._opened.set()

    def start_another(self) -> int:
        print("this goes nowhere", flush=True)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    def raise_signal(self, number: int) -> str:
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        return "alive"


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child(Served, "test", threads=2)
    yield made
    made.kill()


def test_calls_are_answered_several_at_a_time(child: Child) -> None:
    waiting = child.submit("wait")
    assert child.submit("add", 1, 2).result(LIMIT_S) == 3
    assert not waiting.done()
    child.submit("open")
    assert waiting.result(LIMIT_S) is None


def test_texts_come_before_the_answer() -> None:
    texts: list[str] = []
    child = Child(Served, "test", told=texts.append)
    assert child.submit("add", 4, 5).result(LIMIT_S) == 9
    assert texts == ["adding 4"]
    child.kill()


def test_errors_are_those_of_the_method(child: Child) -> None:
    with pytest.raises(InputError, match="no such file"):
        child.submit("fail").result(LIMIT_S)
    with pytest.raises(RuntimeError, match="Awkward: 1 and 2"):
        child.submit("fail_awkwardly").result(LIMIT_S)


def test_its_output_goes_nowhere_and_all_that_it_started_ends_with_it(
    child: Child, capfd: pytest.CaptureFixture[str]
) -> None:
    other = child.submit("start_another").result(LIMIT_S)
    assert capfd.readouterr().out == ""
    child.kill()
    wait_for(lambda: not psutil.pid_exists(other), "the end of the process", timeout_s=LIMIT_S)
    with pytest.raises(ChildEnded, match="killed by SIGKILL"):
        child.submit("add", 1, 2).result(LIMIT_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_signals_to_the_group_are_the_parents(child: Child, number: int) -> None:
    assert child.submit("raise_signal", number).result(LIMIT_S) == "alive"


def test_a_call_ends_with_a_child_that_is_killed(child: Child) -> None:
    call = child.submit("wait")
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildEnded, match="killed by SIGKILL"):
        call.result(LIMIT_S)


def test_a_child_that_is_stopped_is_killed(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    child.submit("add", 1, 2).result(LIMIT_S)
    monkeypatch.setattr(child_module, "SILENCE_S", 2.0)
    call = child.submit("wait")
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(ChildEnded, match="had not answered for 2 s and was killed"):
        call.result(LIMIT_S)


def test_it_ends_with_its_parent() -> None:
    program = (
        "import time\n"
        "from launcher.child import Child\n"
        "from tests.unit.launcher.test_child import Served\n"
        "if __name__ == '__main__':\n"
        "    print(Child(Served, 'test').pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(pid), "the end of the child", timeout_s=LIMIT_S)


LEAVES = """
import multiprocessing
from launcher.child import Child

class Leaving:
    def lock(self):
        self.held = multiprocessing.get_context("spawn").Lock()

if __name__ == "__main__":
    child = Child(Leaving, "leaving")
    child.submit("lock").result()
    child.kill()
"""


def test_what_a_killed_child_leaves_is_removed_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    command = [sys.executable, str(tmp_path / "leaves.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "PYTHONPATH": "."}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
