"""What a failure probably means, and what to try next: a table of symptoms, as they stand in the libraries' messages.

muster's own errors say it themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from trainer.recipe import Recipe
from trainer.run.failure import Failure

Fitting = Callable[[Recipe, int], list[str]]
"""Overrides under which a recipe fits a device of so many bytes, as far as somebody can tell."""

GIB = 1 << 30
CAPACITY = re.compile(r"total capacity of ([\d.]+) GiB")


class FailedRun(NamedTuple):
    """``run``: its address."""

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


def _doctor(failed: FailedRun) -> str:
    return f"`muster doctor RECIPE` tests the network between the workers; `{failed.logs}` has more"


def _less_memory(failed: FailedRun) -> str:
    capacity = CAPACITY.search(failed.cause.message)
    limit = f"{float(capacity[1]):g}GiB" if capacity else "SIZE"
    fitting = failed.fitting(failed.recipe, int(float(capacity[1]) * GIB)) if capacity else []
    if fitting:
        return f"the plan says that one of these fits: {'; '.join(fitting)}"
    return f"`muster plan RECIPE --gpu-memory {limit}` says what it takes and what would fit"


SYMPTOMS = (
    Symptom(_sign(r"(cuda|hip) out of memory|OutOfMemoryError: (cuda|hip)"), "the GPU's memory is full", _less_memory),
    Symptom(
        _sign(r"can't allocate memory|cannot allocate memory|^rank \d+( on \S+)? died.*out of memory|MemoryError"),
        "the host's memory is full",
        lambda failed: (
            "fewer workers per host, or a smaller training.micro_batch; `muster plan RECIPE` says "
            "what each rank takes of its host"
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
        "a kernel failed on the GPU, often of a token outside the model's vocabulary; where it is said is too late",
        lambda failed: "CUDA_LAUNCH_BLOCKING=1 in the workers' environment has the stack show the call itself",
    ),
    Symptom(
        _sign(r"nccl|gloo|connection (closed|reset)|process ?group"),
        "another worker died, or the network between the workers failed",
        _doctor,
    ),
    Symptom(
        _sign(r"^rank \d+( on \S+)? died"),
        "its process was killed from outside or crashed",
        lambda failed: f"`{failed.logs}` has its last words, and its host's kernel log (dmesg) whether memory ran out",
    ),
)
"""The first that fits is it."""


def advise(cause: Failure, recipe: Recipe, run: str, fitting: Fitting = lambda recipe, device: []) -> str:
    """Lines for a person; empty for what explains itself. ``fitting`` is asked when a GPU's memory was full."""
    if cause.own:
        return ""
    failed = FailedRun(cause, recipe, run, fitting)
    for symptom in SYMPTOMS:
        if symptom.sign.search(cause.message):
            return f"  likely: {symptom.likely}\n  next:   {symptom.next(failed)}"
    return f"  next:   `{failed.logs}` has all of it" if cause.trace else ""
