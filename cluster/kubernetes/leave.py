"""Runs in a pod before it is stopped (`preStop` in rayjob.yaml): gives the run time to commit a checkpoint.

Kubernetes stops a container by a signal to its first process, which is Ray; Ray then ends everything at once. So on the
head, this script first interrupts the driver, as Ctrl-C would, and waits for it: its workers commit, and it ends with
exit code 3. On a worker, it reports to Ray that this node will be taken away: muster's driver sees that, the workers
commit, the run continues without the node, and this script waits for the training processes here. Kubernetes ends the
wait with the pod's grace period (`terminationGracePeriodSeconds`).

Linux only (/proc), standard library only; a process that cannot be read belongs to another user.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

RECIPE_PATH = "/etc/muster/recipe.yaml"
POLL_S = 0.5
TELL_S = 20
Words = list[str]


def is_driver(words: Words) -> bool:
    """Recognises the `muster` process itself; a shell around it has the path only inside a longer word."""
    return RECIPE_PATH in words and Path(words[0]).name.startswith(("python", "muster"))


def is_training(words: Words) -> bool:
    """Recognises a training worker by the title that Ray gives to its process."""
    return words[0].startswith("ray::RayTrainWorker")


def running(wanted: Callable[[Words], bool], proc: Path = Path("/proc")) -> list[int]:
    """Returns the ids of the processes whose command line is ``wanted``, without this process."""
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            words = (folder / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
        except OSError:
            continue
        if words[0] and wanted(words):
            found.append(int(folder.name))
    return found


def announce() -> None:
    """Reports to Ray's head that this node will be taken away. Does nothing if the head itself is gone."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is being stopped"]
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["ray", "drain-node", *reason], timeout=TELL_S, stdin=subprocess.DEVNULL)


def main(role: str) -> None:
    wanted = is_driver if role == "head" else is_training
    if role == "head":
        for pid in running(wanted):
            os.kill(pid, signal.SIGTERM)
    else:
        announce()
    while running(wanted):
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(sys.argv[1])
