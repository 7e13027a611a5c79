"""Signals end a process with exit code 3 whatever it is doing. Each case is a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import wait_for
from trainer.interruption import kill_tree

ROOT = Path(__file__).resolve().parents[3]
TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
BEGIN = "import os, signal, sys, time\nfrom trainer.interruption import current\ncurrent.begin()\n"
WAIT = "print('ready', flush=True)\ntime.sleep(60)\n"
# A call into C that a signal does not end, as a library's may be.
STUCK = "current.command('run it again')\nimport ctypes\nctypes.CDLL(None).system(b'echo ready; sleep 60')\n"
RAISED = """
current.command('run it again')
try:
    print('ready', flush=True)
    while True:
        time.sleep(0.1)  # one long call would not be woken by a signal that comes just before it
except (KeyboardInterrupt, SystemExit):
    print('unwound', flush=True)
    {then}
current.leave()
"""


class Ended:
    def __init__(self, code: int, output: str, error: str, took_s: float) -> None:
        self.code, self.output, self.error, self.took_s = code, output, error, took_s


def process_of(code: str, *, before: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", before + BEGIN + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str], began: float) -> Ended:
    output, error = process.communicate(timeout=60)
    return Ended(process.returncode, output, error, time.monotonic() - began)


def after(code: str, *numbers: signal.Signals, gap_s: float = 1.0, before: str = "") -> Ended:
    """How a process ends that runs ``code`` and gets these signals."""
    process, began = process_of(code, before=before), time.monotonic()
    for i, number in enumerate(numbers):
        time.sleep(gap_s if i else 0.0)
        process.send_signal(number)
    return ended(process, began)


@pytest.mark.parametrize("number", [TERM, INT, HUP, USR1])
def test_before_a_command_has_begun(number: signal.Signals) -> None:
    end = after(WAIT, number)
    assert (end.code, end.error) == (
        3,
        f"muster: interrupted: {number.name}: ended before it was done; nothing was begun\n",
    )


@pytest.mark.parametrize("number", [TERM, INT, HUP, USR1])
def test_a_command_is_unwound(number: signal.Signals) -> None:
    end = after(RAISED.format(then="pass"), number)
    assert (end.code, end.output) == (3, "unwound\n")
    assert end.error == f"muster: interrupted: {number.name}: ended before it was done; run it again\n"


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_second_signal_does_not_wait_for_the_unwinding(number: signal.Signals) -> None:
    end = after(RAISED.format(then="time.sleep(60)"), TERM, number)
    assert (end.code, end.took_s < 10) == (3, True)
    assert end.error.count("muster: interrupted: SIGTERM") == 1


def test_unwinding_has_a_limit() -> None:
    short = "import trainer.interruption\ntrainer.interruption.LEAVE_S = 1.0\n"
    end = after(RAISED.format(then="time.sleep(60)"), TERM, before=short)
    assert (end.code, end.took_s < 15) == (3, True)


def test_a_call_into_c_does_not_keep_the_process() -> None:
    end = after(STUCK, TERM, before="import trainer.interruption\ntrainer.interruption.LEAVE_S = 1.0\n")
    assert (end.code, end.took_s < 15) == (3, True)
    assert end.error == "muster: interrupted: SIGTERM: ended before it was done; run it again\n"


def test_processes_that_were_started_go_too() -> None:
    code = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid, file=sys.stderr, flush=True)\n"
    )
    end = after(code + WAIT, TERM)
    child = int(end.error.split()[0])
    wait_for(lambda: not psutil.pid_exists(child), "the child's end")
    assert end.code == 3


def test_what_is_ignored_under_nohup_stays_ignored() -> None:
    ignored = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = process_of(WAIT, before=ignored)
    process.send_signal(HUP)
    began = time.monotonic()
    process.send_signal(TERM)
    assert "SIGTERM" in ended(process, began).error


def test_a_closed_terminal_is_one_signal() -> None:
    """Its shell and the kernel both send SIGHUP."""
    code = (
        "asked = []\ncurrent.command('x')\nwith current.asking(asked.append):\n    print('ready', flush=True)\n"
        "    while not asked: time.sleep(0.01)\n    time.sleep(2)\n    print(asked, flush=True)\n"
        "current.leave('committed')\n"
    )
    end = after(code, HUP, HUP, gap_s=0.1)
    assert (end.code, end.output, end.error) == (3, "['SIGHUP']\n", "muster: interrupted: committed\n")


def test_asked_twice_it_raises() -> None:
    code = (
        "current.command('x')\ntry:\n    with current.asking(lambda name: print(name, flush=True)):\n"
        "        print('ready', flush=True)\n        time.sleep(60)\nexcept SystemExit:\n    current.leave()\n"
    )
    end = after(code, TERM, TERM)
    assert (end.code, end.output) == (3, "SIGTERM\n")


@pytest.mark.parametrize("number", [TERM, INT, HUP])
def test_a_settled_exit_code_stays(number: signal.Signals) -> None:
    """Also where the interpreter's end waits for something."""
    code = (
        "import atexit\natexit.register(time.sleep, 60)\ncurrent.settle(7)\nprint('ready', flush=True)\nsys.exit(7)\n"
    )
    end = after(code, number)
    assert (end.code, end.error, end.took_s < 30) == (7, "", True)


def test_a_forked_process_has_signals_of_its_own() -> None:
    """One that a pool ends by SIGTERM does not end who has forked it."""
    code = (
        "import multiprocessing\ncurrent.command('x')\nchild = multiprocessing.get_context('fork').Process("
        "target=time.sleep, args=(60,))\nchild.start()\nchild.terminate()\nchild.join()\nprint('ready', flush=True)\n"
        "time.sleep(1)\nprint(child.exitcode, current.heard)\n"
    )
    end = ended(process_of(code), time.monotonic())
    assert (end.code, end.output) == (0, f"-{int(TERM)} None\n")


def test_a_tree_that_grows_while_it_is_killed_is_killed_as_a_whole() -> None:
    mark = f"grown-{uuid.uuid4().hex}"
    grow = f"import subprocess\nfor n in range(400): subprocess.Popen(['sleep', '600'], env={{'MARK': {mark!r}}})"
    root = subprocess.Popen([sys.executable, "-c", grow], env={"MARK": mark})

    def grown() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    try:
        wait_for(lambda: len(psutil.Process(root.pid).children()) > 20, "a tree that grows", timeout_s=60, every_s=0.01)
        kill_tree(root.pid)
        wait_for(lambda: not grown(), "no process of the tree", timeout_s=20, logs=lambda: str(grown()))
    finally:
        root.kill()
        root.wait()
        for process in grown():
            process.kill()
