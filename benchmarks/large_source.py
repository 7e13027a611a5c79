"""A source of millions of rows: is it prepared, planned and opened for training in bounded memory, and how fast?

    .venv/bin/python benchmarks/large_source.py                       2 million rows in a temporary folder
    .venv/bin/python benchmarks/large_source.py --rows 200000         a tenth: memory should be the same
    .venv/bin/python benchmarks/large_source.py --folder DIR          in DIR, which stays and is used again

Each phase runs in a process of its own, whose peak of resident memory is what the table shows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.memory import peak_mib  # noqa: E402

SEQUENCE_LENGTH, SEED = 2048, 17
GLOBAL_BATCH, MICRO_BATCH, STEPS = 16, 4, 200
MIB = 1 << 20


def write(folder: Path, rows: int, processes: int) -> str:
    from benchmarks.synthetic import write_rows

    if not (folder / "rows").exists():
        write_rows(folder / "rows.part", rows, files=16)
        (folder / "rows.part").rename(folder / "rows")
    size = sum(p.stat().st_size for p in (folder / "rows").iterdir())
    return f"{rows:,} rows, {size / MIB:,.0f} MiB of JSON Lines"


def prepare_dataset(folder: Path, rows: int, processes: int) -> str:
    from benchmarks.synthetic import make_tokenizer
    from trainer.data import describe, freeze, prepare_dataset, process_pool
    from trainer.recipe import SourceSection
    from trainer.storage import open_storage

    source = SourceSection.model_validate({"path": f"{folder}/rows/*.jsonl", "format": "completion"})
    tokenizer = make_tokenizer()
    spec = describe(freeze([source]), tokenizer, sequence_length=SEQUENCE_LENGTH)
    shared = open_storage(str(folder / "prepared"))
    prepared = prepare_dataset(spec, tokenizer, shared, map_windows=process_pool(processes))
    (folder / "fingerprint").write_text(prepared.fingerprint)
    totals = prepared.totals
    return f"{len(prepared.windows)} windows, {totals.samples:,} samples, {totals.tokens:,} tokens"


def plan(folder: Path, rows: int, processes: int) -> str:
    """The whole first epoch; a run plans a window at a time, as it comes to it."""
    from trainer.data.loading.stream import plan_settings
    from trainer.data.order.pack_order import epoch_order, plan_window

    prepared = opened(folder)
    settings = plan_settings(prepared, SEED, SEQUENCE_LENGTH, True, [1.0])
    packs = tokens = 0
    for window in epoch_order(settings.order_key, SEED, 0, prepared.count):
        planned = plan_window(prepared.index(window), settings, 0, window)
        packs, tokens = packs + len(planned), tokens + int(planned.tokens.sum())
    return f"{packs:,} packs of {SEQUENCE_LENGTH}, {tokens / packs / SEQUENCE_LENGTH:.2%} full"


def open_for_training(folder: Path, rows: int, processes: int) -> str:
    """From nothing but the storage to the arrays of the first step."""
    stream = new_stream(folder)
    step = stream.read_step(stream.step(stream.start()), 0, 1)
    return f"the first step: {step.plan.samples} samples, {step.plan.tokens:,} tokens"


def train(folder: Path, rows: int, processes: int) -> str:
    stream = new_stream(folder)
    began, tokens = time.perf_counter(), 0
    with stream.prefetch(stream.start(), 0, 1, steps=STEPS) as steps:
        for step in steps:
            tokens += sum(batch.tokens for batch in step.batches)
    return f"{STEPS} steps read, {tokens / (time.perf_counter() - began):,.0f} tokens/s"


def opened(folder: Path) -> Any:
    from trainer.data import open_prepared
    from trainer.storage import open_storage

    prepared = open_prepared(open_storage(str(folder / "prepared")), (folder / "fingerprint").read_text())
    assert prepared is not None, "the data were prepared a phase earlier"
    return prepared


def new_stream(folder: Path) -> Any:
    from trainer.data import Stream
    from trainer.storage import open_storage

    return Stream(
        opened(folder),
        open_storage(tempfile.mkdtemp(prefix="run-", dir=folder)),
        seed=SEED,
        sequence_length=SEQUENCE_LENGTH,
        packing=True,
        weights=[1.0],
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
    )


Phase = Callable[[Path, int, int], str]


def measured(phase: Phase, *arguments: Any) -> tuple[str, float, int, int]:
    """What the phase says, seconds, and the peaks of its process and of the largest of that one's children, in MiB."""
    began = time.perf_counter()
    said = phase(*arguments)
    seconds = time.perf_counter() - began
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return said, seconds, int(peak_mib()), children


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, help="where source and prepared data stay; a temporary one without it")
    parser.add_argument("--processes", type=int, default=2, help="that tokenise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="large-source-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report(folder, options.rows, options.processes)


def report(folder: Path, rows: int, processes: int) -> None:
    print(f"{'phase':<20}{'seconds':>9}{'peak MiB':>10}{'child MiB':>11}  what", flush=True)
    for phase in (write, prepare_dataset, plan, open_for_training, train):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            said, seconds, own, child = alone.submit(measured, phase, folder, rows, processes).result()
        print(f"{phase.__name__.replace('_', ' '):<20}{seconds:>9.1f}{own:>10,}{child:>11,}  {said}", flush=True)


if __name__ == "__main__":
    main()
