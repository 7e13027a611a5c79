"""Run in a pod before it is stopped (`preStop` in rayjob.yaml): leaves the run time to commit a checkpoint.

Kubernetes stops a container by a signal to its first process, which is Ray; Ray then ends everything at once. So on the
head the driver is told first, as Ctrl-C would, and waited for: its workers commit and it ends with exit code 3. On a
worker the training processes are waited for: when the head goes as well they end by themselves, otherwise they train on
until the pod's grace period is over. Kubernetes ends this wait with that period (`terminationGracePeriodSeconds`).

Linux only (/proc), standard library only; a process that cannot be read is somebody else's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

RECIPE_PATH = "/etc/muster/recipe.yaml"
POLL_S = 0.5
Words = list[str]


def is_driver(words: Words) -> bool:
    """The `muster` process itself; a shell around it holds the path within a longer word, if at all."""
    return RECIPE_PATH in words and Path(words[0]).name.startswith(("python", "muster"))


def is_training(words: Words) -> bool:
    """By the title that Ray gives to a training worker's process."""
    return words[0].startswith("ray::RayTrainWorker")


def running(wanted: Callable[[Words], bool], proc: Path = Path("/proc")) -> list[int]:
    """Process ids whose command line is ``wanted``; never this process."""
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


def main(role: str) -> None:
    wanted = is_driver if role == "head" else is_training
    if role == "head":
        for pid in running(wanted):
            os.kill(pid, signal.SIGTERM)
    while running(wanted):
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(sys.argv[1])
