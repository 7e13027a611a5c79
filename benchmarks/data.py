"""The data path measured: one table, every ratio from one run on one machine.

    .venv/bin/python benchmarks/data.py                      made-up rows with GSM8K's lengths, about 5 minutes
    .venv/bin/python benchmarks/data.py --data FILE.jsonl    the fill of the packs from FILE's rows (prompt/completion,
                                                             or question/answer as in GSM8K)

S3 is moto's server, started here on this machine: it shares the cores with what is measured, so that figures over S3
are lower bounds. The readers take turns, and the median of their turns counts. Tokens are counted without padding.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import peers  # noqa: E402
from benchmarks.memory import peak_mib  # noqa: E402
from benchmarks.synthetic import make_tokenizer, write_rows  # noqa: E402
from tests.support.s3 import S3, serve  # noqa: E402
from trainer.data import (  # noqa: E402
    Cursor,
    PreparedDataset,
    Stream,
    count_steps,
    describe,
    freeze,
    open_prepared,
    prepare_dataset,
    process_pool,
    summarise,
)
from trainer.data.loading.disk_cache import DiskCache  # noqa: E402
from trainer.recipe import SourceSection  # noqa: E402
from trainer.storage import Storage, open_storage  # noqa: E402

SEQUENCE_LENGTH, SEED = 2048, 17
GLOBAL_BATCH, MICRO_BATCH = 16, 4
MIB = 1 << 20


class Row(NamedTuple):
    what: str
    figure: str
    ratio: str = ""
    aim: str = ""


@dataclass(frozen=True)
class Place:
    """The same rows, prepared data and runs, in a folder or in a bucket."""

    name: str
    rows: str
    shared: Storage
    runs: str
    prepared: PreparedDataset

    def stream(
        self, *, cache: DiskCache | None = None, prepared: PreparedDataset | None = None, run: str = ""
    ) -> Stream:
        return Stream(
            prepared or self.prepared,
            open_storage(f"{self.runs}/{run or time.monotonic_ns()}"),
            seed=SEED,
            sequence_length=SEQUENCE_LENGTH,
            packing=True,
            weights=[1.0],
            global_batch=GLOBAL_BATCH,
            micro_batch=MICRO_BATCH,
            cache=cache,
        )


def prepared_at(name: str, rows: str, base: str, tokenizer: Any) -> Place:
    columns = {} if name != "file" else question_columns(rows)
    source = SourceSection.model_validate({"path": rows, "format": "completion", "columns": columns})
    spec = describe(freeze([source]), tokenizer, sequence_length=SEQUENCE_LENGTH)
    shared = open_storage(f"{base}/prepared")
    prepared = prepare_dataset(spec, tokenizer, shared, map_windows=process_pool(2))
    return Place(name, rows, shared, f"{base}/runs", prepared)


def question_columns(file: str) -> dict[str, str]:
    with open(file) as lines:
        first = json.loads(next(lines))
    return {} if "prompt" in first else {"prompt": "question", "completion": "answer"}


# tokens per second


def ours(stream: Stream) -> Iterator[int]:
    with stream.prefetch(stream.start(), 0, 1) as steps:
        for step in steps:
            yield sum(batch.tokens for batch in step.batches)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Tokens per second from the first batch on: what a reader needs to start is measured elsewhere."""
    next(batches)
    began, tokens = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        tokens += next(batches)
    close = getattr(batches, "close", None)
    if close:
        close()
    return tokens / spent


def throughput(local: Place, s3: Place, tokenizer: Any, folder: Path, seconds: float, turns: int) -> list[Row]:
    cache = DiskCache(made(folder / "cache"), 1 << 33)
    readers: dict[str, Callable[[], Iterator[int]]] = {
        "muster, local files": lambda: ours(local.stream()),
        "muster, S3": lambda: ours(s3.stream()),
        "muster, S3 with the host's cache": lambda: ours(s3.stream(cache=cache)),
        "datasets streaming, S3": lambda: peers.streaming(s3.rows, tokenizer),
        "datasets streaming, local files": lambda: peers.streaming(local.rows, tokenizer),
    }
    missing = peers.missing_torchdata()
    if missing is None:
        readers["StatefulDataLoader over datasets, S3"] = lambda: peers.stateful(s3.rows, tokenizer)
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(turns):
        for name, reader in readers.items():
            found[name].append(rate(reader(), seconds))
            gc.collect()
    median = {name: statistics.median(rates) for name, rates in found.items()}
    base, peer = median["muster, S3"], median["datasets streaming, S3"]
    table = [Row("tokens/s: datasets streaming, S3", f"{peer:,.0f}", "1")]
    for name, value in median.items():
        if value != peer:
            aim = "at least 5" if name == "muster, S3" else ""
            table.append(Row(f"tokens/s: {name}", f"{value:,.0f}", f"{value / peer:.1f}", aim))
    table.append(Row("tokens/s: S3 against local files", "", f"{base / median['muster, local files']:.2f}"))
    if missing:
        table.append(Row("tokens/s: StatefulDataLoader", f"left out: {missing}"))
    return table


# resume


class Requests:
    """Counts the reads of all storages of this process while it is entered."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Requests:
        self._kept = {name: getattr(Storage, name) for name in ("read", "read_range")}
        for name, original in self._kept.items():
            setattr(Storage, name, self._counting(original))
        return self

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.count += 1
            return original(*arguments)

        return call

    def __exit__(self, *exc: object) -> None:
        for name, original in self._kept.items():
            setattr(Storage, name, original)


def resume(s3: Place, turns: int) -> list[Row]:
    """From a cursor to the arrays of the next step, with nothing held in memory or on disk."""
    stream, cursors = s3.stream(run="resumed"), {}
    steps = count_steps(
        s3.prepared,
        seed=SEED,
        epochs=1,
        global_batch=GLOBAL_BATCH,
        sequence_length=SEQUENCE_LENGTH,
        packing=True,
        weights=[1.0],
    )
    cursor = stream.start()
    for number in range(steps):
        for share in (0.01, 0.9):
            if number == int(share * steps):
                cursors[share] = cursor
        cursor = stream.step(cursor).next
    times: dict[float, list[float]] = {share: [] for share in cursors}
    requests: dict[float, set[int]] = {share: set() for share in cursors}
    resumed(s3, cursors[0.01])  # connections and imports
    for _ in range(turns):
        for share, cursor in cursors.items():
            with Requests() as counted:
                times[share].append(resumed(s3, cursor))
            requests[share].add(counted.count)
    early, late = (statistics.median(times[share]) for share in (0.01, 0.9))
    counts = [" or ".join(map(str, sorted(requests[share]))) for share in (0.01, 0.9)]
    return [
        Row("resume: seconds at 1 % of an epoch", f"{early:.3f}", "1"),
        Row("resume: seconds at 90 %", f"{late:.3f}", f"{late / early:.2f}", "at most 1.1"),
        Row("resume: GETs at 1 % and at 90 %", f"{counts[0]} and {counts[1]}", "", "the same"),
    ]


def resumed(place: Place, cursor: Cursor) -> float:
    began = time.perf_counter()
    prepared = open_prepared(place.shared, place.prepared.fingerprint)
    stream = place.stream(prepared=prepared, run="resumed")
    step = stream.read_step(stream.step(cursor), 0, 1)
    assert step.plan.tokens == sum(batch.tokens for batch in step.batches)
    return time.perf_counter() - began


# memory


def memory(local: Place) -> list[Row]:
    peaks = []
    for times in (1, 10):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            task = local.shared.url, local.prepared.fingerprint, local.runs, times
            peaks.append(alone.submit(peak_of_an_epoch, *task).result())
    (before, once), (_, tenfold) = peaks
    return [
        Row("memory: peak MiB while an epoch is read", f"{once:,.0f}", "1"),
        Row("memory: of ten times the data", f"{tenfold:,.0f}", f"{tenfold / once:.2f}", "at most 1.1"),
        Row("memory: of that, before the data are opened", f"{before:,.0f}"),
    ]


def peak_of_an_epoch(url: str, fingerprint: str, runs: str, times: int) -> tuple[float, float]:
    """In a process of its own: MiB before and at the peak. Ten times the data are the windows ten times over, each
    read, checked and planned as if it were another."""
    found = open_prepared(open_storage(url), fingerprint)
    assert found is not None
    place = Place("", "", open_storage(url), runs, PreparedDataset(found.storage, found.spec, found.windows * times))
    stream = place.stream()
    before = peak_mib()
    with stream.prefetch(stream.start(), 0, 1) as steps:
        for step in steps:
            if step.plan.epoch:
                break
    return before, peak_mib()


# fill


def fill(place: Place, told: str) -> Row:
    summary = summarise(place.prepared, SEED, [1.0])
    assert summary.fill is not None
    told = f"{told}, median {summary.median} tokens"
    return Row(f"fill of packs of {SEQUENCE_LENGTH}: {told}", f"{summary.fill:.2%}", "", "at least 99 %")


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def upload(s3: S3, folder: Path) -> None:
    fs = s3.filesystem()
    for file in folder.iterdir():
        fs.put_file(str(file), f"corpus/rows/{file.name}")


def measure(s3: S3, folder: Path, options: argparse.Namespace) -> list[Row]:
    size = write_rows(folder / "rows", options.rows)
    upload(s3, folder / "rows")
    tokenizer = make_tokenizer()
    local = prepared_at("local", f"{folder}/rows/*.jsonl", f"{folder}/local", tokenizer)
    remote = prepared_at("S3", "s3://corpus/rows/*.jsonl", "s3://runs/data", tokenizer)
    told = f"{options.rows:,} rows, {size / MIB:,.0f} MiB, {len(local.prepared.windows)} windows"
    table = [Row(f"data: {told}", f"{local.prepared.totals.tokens:,} tokens"), fill(local, "GSM8K's lengths")]
    if options.data:
        file = prepared_at("file", str(options.data.resolve()), f"{folder}/file", tokenizer)
        table.append(fill(file, options.data.name))
    table += memory(local)
    table += resume(remote, options.turns * 3)
    return table + throughput(local, remote, tokenizer, folder, options.seconds, options.turns)


def show(table: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE)
    for name in Row._fields:
        shown.add_column(name, justify="right" if name in ("figure", "ratio") else "left")
    for row in table:
        shown.add_row(*row)
    Console(width=130, highlight=False).print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSON Lines whose packs are to be filled as well")
    parser.add_argument("--rows", type=int, default=200_000, help="made-up rows")
    parser.add_argument("--seconds", type=float, default=6.0, help="that each reader runs in each turn")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with serve() as s3, tempfile.TemporaryDirectory(prefix="data-benchmark-") as folder:
        os.environ.update(s3.env)
        s3.reset()
        show(measure(s3, Path(folder), options))


if __name__ == "__main__":
    main()
