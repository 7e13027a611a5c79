"""Checkpoints measured: what they cost the loop, and what it costs to go on from one. One table, ratios from one run.

    .venv/bin/python benchmarks/checkpoint.py                  all parts, about 8 minutes on two cores
    .venv/bin/python benchmarks/checkpoint.py stall steps      some: stall, steps, restore, recovery

What is compared takes turns in one process, and the median counts, so that a busy machine slows both sides alike. The
storage is a folder on this machine, where every file is flushed to the disk.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launcher.quickstart.corpus import pretraining_texts  # noqa: E402
from launcher.quickstart.model import LlamaShape, make_model  # noqa: E402
from tests.support.jobs import muster_run, wait_for_step, workers  # noqa: E402
from tests.support.training import run_of, small_recipe, train_here, write_pairs  # noqa: E402
from tests.support.waiting import wait_for  # noqa: E402
from trainer.data import Stream  # noqa: E402
from trainer.recipe import Recipe  # noqa: E402
from trainer.run import layout  # noqa: E402
from trainer.run.jsonl import read_rows  # noqa: E402
from trainer.worker.async_committer import Committer  # noqa: E402
from trainer.worker.checkpointer import Checkpointer  # noqa: E402

SMALL = LlamaShape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=384, positions=512)
LARGE = LlamaShape(hidden=320, layers=6, heads=8, kv_heads=4, intermediate=960, vocabulary=512, positions=512)
ROUNDS, RESUMES, KILLS = 5, 40, 3
EARLY, LATE = 10, 10_000


class Row(NamedTuple):
    what: str
    figure: str
    ratio: str = ""
    aim: str = ""


class Waiting(Committer):
    """What the loop would do without a thread beside it: wait until the checkpoint is committed."""

    def submit(self, *snapshot: Any) -> None:
        super().submit(*snapshot)
        while self.lag().backlog:
            self.check()
            time.sleep(0.001)


class Bench:
    """Recipes over one folder; ``trained`` runs one in this process and returns it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_pairs(folder / "data" / "a.jsonl", 90)
        texts = pretraining_texts(seed=3, count=200)
        self.small = make_model(folder / "small", SMALL, texts, seed=3)
        self.large = make_model(folder / "large", LARGE, texts, seed=3)
        self._count = 0

    def recipe(self, model: Path, **changes: Any) -> Recipe:
        self._count += 1
        base = {"data.ledger": False, "training": {"steps": 24, "global_batch": 8, "micro_batch": 4}}
        return small_recipe(f"run-{self._count}", model, self.folder, **{**base, **changes})

    def trained(self, model: Path, **changes: Any) -> Recipe:
        recipe = self.recipe(model, **changes)
        train_here(recipe)
        return recipe


@contextmanager
def timed_stalls(committer: type[Committer]) -> Iterator[list[float]]:
    """Seconds for which each checkpoint held the loop up, with this committer."""
    stalls: list[float] = []
    plain = Checkpointer.on_checkpoint

    def timed(self: Checkpointer, *arguments: Any, **named: Any) -> None:
        began = time.perf_counter()
        plain(self, *arguments, **named)
        stalls.append(time.perf_counter() - began)

    with (
        mock.patch.object(Checkpointer, "on_checkpoint", timed),
        mock.patch("trainer.worker.checkpointer.Committer", committer),
    ):
        yield stalls


def stall(bench: Bench) -> list[Row]:
    """All weights of a model and both moments: tens of megabytes per checkpoint."""
    seconds: dict[type[Committer], list[float]] = {Committer: [], Waiting: []}
    size = 0.0
    for _ in range(ROUNDS):
        for committer, all_of_them in seconds.items():
            with timed_stalls(committer) as stalls:
                recipe = bench.trained(bench.large, checkpoint={"every_steps": 4}, adapter={"method": "none"})
            all_of_them += stalls[1:]
            size = next(e["bytes"] for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "checkpoint")
    behind, waited = (statistics.median(s) for s in seconds.values())
    return [
        Row(f"synchronous write of {size / 2**20:.0f} MiB, p50", f"{waited * 1e3:.0f} ms"),
        Row("stall per asynchronous checkpoint, p50", f"{behind * 1e3:.1f} ms", f"{behind / waited:.1%}", "≤ 10 %"),
    ]


def steps(bench: Bench) -> list[Row]:
    """A LoRA, as most runs are. A step counts with the stall after it; the ratio is that of neighbouring runs."""

    def seconds(every: int) -> float:
        rows = read_rows(run_of(bench.trained(bench.large, checkpoint={"every_steps": every})), layout.METRICS)
        return statistics.median(row["step_s"] + row["stall_s"] for row in rows[2:])

    pairs = [(seconds(10**6), seconds(1)) for _ in range(ROUNDS)]
    never, always = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(always / never for never, always in pairs)
    return [
        Row("step without checkpoints, p50", f"{never * 1e3:.0f} ms"),
        Row("step with a checkpoint at every step, p50", f"{always * 1e3:.0f} ms", f"{ratio:.3f}", "≤ 1.05"),
    ]


def restore(bench: Bench) -> list[Row]:
    """The same run's checkpoints of an early and a late step, resumed in turns: listing, verifying and loading, and the
    wait for the next step's data."""
    training = {"steps": LATE + 10, "global_batch": 2, "micro_batch": 2}
    recipe = bench.recipe(bench.small, training={**training, "stop_after": EARLY}, checkpoint={"every_steps": 1000})
    kept: dict[int, Path] = {}
    for step in (EARLY, LATE):
        train_here(stopping(recipe, step))
        kept[step] = bench.folder / f"kept-{step}"
        shutil.copytree(run_of(recipe).url, kept[step])
    seconds: dict[int, list[float]] = {EARLY: [], LATE: []}
    for turn in range(RESUMES):
        for step in (EARLY, LATE) if turn % 2 else (LATE, EARLY):
            shutil.rmtree(run_of(recipe).url)
            shutil.copytree(kept[step], run_of(recipe).url)
            with timed_data() as waits:
                train_here(stopping(recipe, step + 1))
            seconds[step].append(events(recipe, "start")[-1]["restore_s"] + waits[0])
    early, late = (statistics.median(s) for s in seconds.values())
    ratio = statistics.median(late / early for early, late in zip(seconds[EARLY], seconds[LATE], strict=True))
    return [
        Row(f"restore and first data from step {EARLY}, p50", f"{early * 1e3:.1f} ms"),
        Row(f"the same from step {LATE:,}, p50", f"{late * 1e3:.1f} ms", f"{ratio:.2f}", "≤ 1.1"),
    ]


@contextmanager
def timed_data() -> Iterator[list[float]]:
    """Seconds until the first step's batches were there, per attempt."""
    waits: list[float] = []
    plain = Stream.prefetch

    def timed(self: Stream, *arguments: Any, **named: Any) -> Iterator[Any]:
        began = time.perf_counter()
        steps = iter(plain(self, *arguments, **named))
        first = next(steps)
        waits.append(time.perf_counter() - began)
        yield first
        yield from steps

    with mock.patch.object(Stream, "prefetch", timed):
        yield waits


def stopping(recipe: Recipe, step: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": step})})


def recovery(bench: Bench) -> list[Row]:
    """A worker is killed under `muster run`, with two workers on a Ray of its own."""
    changes = {"training.steps": 120 * (KILLS + 1), "checkpoint.every_steps": 10, "resources": {"workers": 2}}
    recipe = bench.recipe(bench.small, **changes)
    command, kills = muster_run(recipe, bench.folder), list[float]()
    for kill in range(KILLS):
        wait_for_step(recipe, 100 * kill + 20, command)
        kills.append(time.time())
        os.kill(workers(recipe)[-1], signal.SIGKILL)
        wait_for(lambda kill=kill: len(events(recipe, "start")) > kill + 1, "the next attempt", timeout_s=120)
    assert command.wait() == 0, command.output()
    starts, failures = events(recipe, "start")[1:], events(recipe, "failure")
    rows = read_rows(run_of(recipe), layout.METRICS)
    firsts = [next(r["step_s"] for r in rows if r["attempt"] == start["attempt"]) for start in starts]
    restored = [start["restore_s"] for start in starts]
    parts = {
        "detect: kill → failure event": [f["time"] - k for f, k in zip(failures, kills, strict=True)],
        "restart: workers, imports, model": [
            s["time"] - s["restore_s"] - f["time"] for s, f in zip(starts, failures, strict=True)
        ],
        "restore: newest whole checkpoint": restored,
        "first step": firsts,
    }
    return [
        Row(f"recovery, {name}, p50 of {KILLS}", f"{statistics.median(took):.2f} s") for name, took in parts.items()
    ]


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    return sorted((e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == kind), key=lambda e: e["time"])


PARTS: dict[str, Callable[[Bench], list[Row]]] = {f.__name__: f for f in (stall, steps, restore, recovery)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure checkpoints.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all without one")
    chosen = parser.parse_args().parts or list(PARTS)
    logging.disable(logging.WARNING)
    print("| what | figure | ratio | aim |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="muster-benchmark-") as folder:
        bench = Bench(Path(folder))
        for part in chosen:
            for row in PARTS[part](bench):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
