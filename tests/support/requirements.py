"""Whether this machine can run real daemons in namespaces, and what is missing otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable

import pytest

# What a host has of its own. The uptime too, so that a reboot can be told from a network that was away.
NAMESPACES = ("--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--ipc", "--time")

IP = ("ip", "iproute2")
SLURM = (("munged", "munge"), ("slurmctld", "slurm-wlm"), ("slurmd", "slurm-wlm"), ("srun", "slurm-wlm"))


def require(programs: Iterable[tuple[str, str]] = (IP,)) -> None:
    """Skips the test that asks for what this machine lacks, saying what; ``programs`` are (program, Debian package).

    In CI, which installs the packages (.ci/run), a missing one is a failure: a test that nobody runs proves nothing.
    """
    if os.geteuid() != 0:
        pytest.skip("not root")
    if reason := missing(programs):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True, timeout=20)
    if tried.returncode != 0:
        pytest.skip(f"cannot unshare: {tried.stderr.strip()}")


def missing(programs: Iterable[tuple[str, str]]) -> str:
    """The first program that is not there, with the command that installs it; empty when all are."""
    for program, package in programs:
        if not shutil.which(program):
            return f"no {program}: apt-get install {package}"
    return ""
