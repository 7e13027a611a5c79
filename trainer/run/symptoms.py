"""Advice on failures: a table of symptoms in libraries' messages, each with its likely cause and a next step.

muster's own errors contain their advice and need no entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from trainer.recipe import Recipe
from trainer.run.failure import Failure

Fitting = Callable[[Recipe, int], list[str]]
"""(recipe, device bytes) -> overrides under which the recipe should fit the device; empty where none is known."""

GIB = 1 << 30
CAPACITY = re.compile(r"total capacity of ([\d.]+) GiB")


class FailedRun(NamedTuple):
    """``run``: the run's address."""

    cause: Failure
    recipe: Recipe
    run: str
    fitting: Fitting

    @property
    def logs(self) -> str:
        rank = "" if self.cause.rank is None else f" --rank {self.cause.rank}"
        return f"muster logs {self.run}{rank}"


class Symptom(NamedTuple):
    sign: re.Pattern[str]
    likely: str
    next: Callable[[FailedRun], str]


def _sign(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def _less_memory(failed: FailedRun) -> str:
    capacity = CAPACITY.search(failed.cause.message)
    limit = f"{float(capacity[1]):g}GiB" if capacity else "SIZE"
    fitting = failed.fitting(failed.recipe, int(float(capacity[1]) * GIB)) if capacity else []
    if fitting:
        return f"according to the plan, one of these fits: {'; '.join(fitting)}"
    return f"`muster plan RECIPE --gpu-memory {limit}` shows how much memory it needs and what would fit"


SYMPTOMS = (
    Symptom(_sign(r"(cuda|hip) out of memory|OutOfMemoryError: (cuda|hip)"), "the GPU's memory is full", _less_memory),
    Symptom(
        _sign(r"can't allocate memory|cannot allocate memory|^rank \d+( on \S+)? died.*out of memory|MemoryError"),
        "the host's memory is full",
        lambda failed: (
            "use fewer workers per host, or a smaller training.micro_batch; `muster plan RECIPE` shows "
            "how much host memory each rank needs"
        ),
    ),
    Symptom(
        _sign(r"no space left on device|disk quota exceeded"),
        "a disk is full on that host",
        lambda failed: "make room in its temporary folder (TMPDIR) and under MUSTER_CACHE, or lower data.cache_bytes",
    ),
    Symptom(
        _sign(r"too many open files"),
        "that host allows a process too few open files",
        lambda failed: "raise the limit where the workers start (`ulimit -n 65536`)",
    ),
    Symptom(
        _sign(r"device-side assert|illegal memory access|CUBLAS_STATUS|CUDNN_STATUS"),
        "a kernel failed on the GPU, often because of a token outside the model's vocabulary; the stack shows a later "
        "call",
        lambda failed: "with CUDA_LAUNCH_BLOCKING=1 in the workers' environment the stack shows the call that failed",
    ),
    Symptom(
        _sign(r"nccl|gloo|connection (closed|reset)|process ?group"),
        "another worker died, or the network between the workers failed",
        lambda failed: f"`muster doctor RECIPE` tests the network between the workers; `{failed.logs}` has more",
    ),
    Symptom(
        _sign(r"^rank \d+( on \S+)? died"),
        "its process was killed from outside or crashed",
        lambda failed: (
            f"`{failed.logs}` shows its last output; its host's kernel log (dmesg) shows whether memory ran out"
        ),
    ),
)
"""The first entry that matches is used."""


def advise(cause: Failure, recipe: Recipe, run: str, fitting: Fitting = lambda recipe, device: []) -> str:
    """Returns lines for the user; empty for an error that explains itself. Calls ``fitting`` only when a GPU's memory
    was full."""
    if cause.own:
        return ""
    failed = FailedRun(cause, recipe, run, fitting)
    for symptom in SYMPTOMS:
        if symptom.sign.search(cause.message):
            return f"  likely: {symptom.likely}\n  next:   {symptom.next(failed)}"
    return f"  next:   `{failed.logs}` has all of it" if cause.trace else ""
