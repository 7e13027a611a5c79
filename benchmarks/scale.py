"""What grows with the number of ranks, measured with simulated ranks, and the goodput that follows from failures.

    .venv/bin/python benchmarks/scale.py                      all parts, 8 to 1,024 ranks, 5 to 10 minutes on two cores
    .venv/bin/python benchmarks/scale.py commit --ranks 8 64  some parts, other numbers of ranks
    .venv/bin/python benchmarks/scale.py goodput              the computed table alone

Simulated ranks are this project's own objects in one process, without a model and without training: what a rank or the
driver does to the storage, to the process group's store and to the cluster is done by the code that does it in a run.
The storage is moto's S3 server on the same cores; HTTP requests are counted where botocore sends them. Eight ranks make
a host. Rank 0 and the driver run their real threads for ``WINDOW_S`` seconds, the driver in a process of its own, whose
CPU time counts; Ray Train's controller is another process, which is measured apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import logging
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from launcher.capacity import Node, missing  # noqa: E402
from launcher.driver.attempts import POLL_S  # noqa: E402
from launcher.driver.resize import NodeMonitor, ResizePolicy, newest_group  # noqa: E402
from launcher.quickstart.corpus import pretraining_texts  # noqa: E402
from launcher.quickstart.model import LlamaShape, make_model  # noqa: E402
from launcher.raytrain.session import health_check_interval_s  # noqa: E402
from tests.support.s3 import serve  # noqa: E402
from tests.support.training import prepare, small_recipe, write_pairs  # noqa: E402
from trainer.checkpoint import (  # noqa: E402
    CommitRecord,
    Retention,
    claim_attempt,
    claim_driver,
    commit,
    fetch,
    fetch_newest,
    put_checkpoint,
    read_claims,
)
from trainer.data import Stream, open_caches  # noqa: E402
from trainer.data.run_data import open_data  # noqa: E402
from trainer.distributed.world import World, stay_on_loopback  # noqa: E402
from trainer.logs.keeper import FLUSH_S, Keeper  # noqa: E402
from trainer.model import fetch_model  # noqa: E402
from trainer.progress.lines import ProgressLines  # noqa: E402
from trainer.recipe import Recipe  # noqa: E402
from trainer.run import layout  # noqa: E402
from trainer.run.events import CheckpointEvent, StartEvent  # noqa: E402
from trainer.run.frozen import freeze_recipe  # noqa: E402
from trainer.run.jsonl import Events, JsonLinesWriter  # noqa: E402
from trainer.run.lease import Lease  # noqa: E402
from trainer.run.metrics import StepMetrics  # noqa: E402
from trainer.run.stop_poller import StopPoller  # noqa: E402
from trainer.storage import in_parallel, open_storage, remote  # noqa: E402
from trainer.storage.pace import write_interval_s  # noqa: E402
from trainer.worker.hang_detector import BEAT_S, HangDetector, look_interval_s  # noqa: E402
from trainer.worker.rank_timer import rank_record  # noqa: E402
from trainer.worker.telemetry import LOG_EVERY_S  # noqa: E402

RANKS = (8, 64, 256, 1024)
RANKS_PER_HOST = 8
WINDOW_S, STEP_S = 20.0, 1.0
PARALLEL = 8
LARGEST_MESH = 64
"""Gloo opens a socket at each end of each pair of ranks; here both ends are in one process."""
SHAPE = LlamaShape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=384, positions=512)
ADAPTER_FILES = {"adapter_config.json": 700, "adapter_model.safetensors": 2**16, "optimizer.safetensors": 2**17}
KEEP_LAST = 3
LINE = b"2026-11-30 00:00:00,000 trainer.worker.telemetry: step 100 of 1000: loss 1.0000, 1.00 s\n"
CPU = torch.device("cpu")
RAY_ACTORS = 4
PATIENCE, TRIES = timedelta(minutes=5), 3


class Row(NamedTuple):
    """``figures``: one per number of ranks."""

    what: str
    figures: Sequence[str]
    aim: str = ""


class Requests(Counter[str]):
    """HTTP requests by method, and ``sent`` and ``received`` bytes of their bodies."""

    @property
    def count(self) -> int:
        return sum(n for name, n in self.items() if name.isupper())

    def __str__(self) -> str:
        kinds = ", ".join(f"{n:,} {name}" for name, n in sorted(self.items()) if name.isupper())
        return f"{self.count:,} ({kinds})"


class Meter:
    """Counts the requests of this process's S3 clients."""

    def __init__(self) -> None:
        self.total = Requests()
        self._lock = threading.Lock()
        self._seen: set[int] = set()
        self._plain = remote.filesystem

    def filesystem(self, url: str, attempts: int = 1) -> Any:
        """Replaces `trainer.storage.remote.filesystem`."""
        fs = self._plain(url, attempts)
        with self._lock:
            if id(fs) not in self._seen:
                self._seen.add(id(fs))
                fs.s3.meta.events.register("before-send.s3", self._sent)
                fs.s3.meta.events.register("after-call.s3", self._received)
        return fs

    def _sent(self, request: Any, **_: Any) -> None:
        headers = request.headers
        size = headers.get("X-Amz-Decoded-Content-Length") or headers.get("Content-Length") or 0
        with self._lock:
            self.total.update({request.method: 1, "sent": int(size)})

    def _received(self, parsed: Any, model: Any, **_: Any) -> None:
        headers = parsed["ResponseMetadata"]["HTTPHeaders"]
        if model.name != "HeadObject":
            with self._lock:
                self.total["received"] += int(headers.get("content-length", 0))

    @contextmanager
    def counting(self) -> Iterator[Requests]:
        """Yields a counter, which has the requests of the block after the block."""
        before, found = Counter(self.total), Requests()
        yield found
        found.update({name: n - before[name] for name, n in self.total.items() if n > before[name]})


@contextmanager
def metered() -> Iterator[Meter]:
    meter = Meter()
    with mock.patch.object(remote, "filesystem", meter.filesystem):
        yield meter


class Bench:
    """Prepared data and a tiny model in a bucket; one run for each number of ranks."""

    def __init__(self, folder: Path, meter: Meter, ranks: Sequence[int]) -> None:
        self.folder, self.meter, self.ranks = folder, meter, ranks
        write_pairs(folder / "data" / "a.jsonl", 90)
        made = make_model(folder / "model", SHAPE, pretraining_texts(seed=3, count=200), seed=3)
        self.model = "s3://models/tiny"
        for file in made.iterdir():
            open_storage(self.model).upload(file.name, file)
        self.checkpoint = folder / "checkpoint"
        self.checkpoint.mkdir()
        for name, size in ADAPTER_FILES.items():
            (self.checkpoint / name).write_bytes(os.urandom(size))
        self._runs: dict[int, Run] = {}

    def run(self, ranks: int) -> Run:
        """Returns the run of so many ranks, with its driver and its first attempt."""
        if ranks not in self._runs:
            self._runs[ranks] = Run(self, ranks)
        return self._runs[ranks]


class Run:
    """A run with its first attempt claimed. Its lease is released, so that no thread makes requests."""

    def __init__(self, bench: Bench, ranks: int) -> None:
        self.bench, self.ranks = bench, ranks
        changes = {"storage": "s3://runs", "model.path": bench.model, "data.ledger": False, "training.steps": 10**6}
        changes |= {"resources": {"workers": ranks}}
        self.recipe: Recipe = small_recipe(f"ranks-{ranks}", Path(), bench.folder, **changes)
        self.shared = open_storage(self.recipe.storage)
        self.storage = self.shared.child(self.recipe.name)
        lease = Lease.acquire(self.storage)
        lease.release("interrupted")
        self.claim()
        prepare(self.recipe, self.shared)
        freeze_recipe(self.storage, self.recipe, self.driver)
        self.keepers: list[Keeper] = []

    def claim(self) -> None:
        """Makes a new driver and attempt, which own the run."""
        self.driver = claim_driver(self.storage, {})
        self.attempt = claim_attempt(self.storage, self.driver, {})

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(f"host{rank // RANKS_PER_HOST:04d}" for rank in range(self.ranks))

    def row(self, step: int) -> StepMetrics:
        """Returns the metrics of a step, with what they hold of the ranks."""
        seconds = [STEP_S * (1 + 1e-4 * rank) for rank in range(self.ranks)]
        row = {"step": step, "total_steps": 10**6, "loss": 1.0, "lr": 1e-4, "step_s": STEP_S, "tokens_per_s": 1e6}
        row |= {"world_size": self.ranks, "grad_norm": 0.5, "samples": step * self.ranks, "epoch": 0}
        return StepMetrics.from_row({**row, **rank_record(seconds, [2.0**33] * self.ranks)})


# start


def start(bench: Bench) -> list[Row]:
    """What each rank reads before its first step, and its first line of output. The host caches are empty."""
    counts = {ranks: _start(bench.run(ranks)) for ranks in bench.ranks}
    return [
        Row("requests at the start, all ranks", [f"{c.count:,}" for c in counts.values()]),
        Row("per rank", [f"{c.count / ranks:.1f}" for ranks, c in counts.items()]),
        Row("MiB received for a model of 0.4 MiB", [f"{c['received'] / 2**20:.1f}" for c in counts.values()]),
    ]


def _start(run: Run) -> Requests:
    with run.bench.meter.counting() as requests:
        for host in range(-(-run.ranks // RANKS_PER_HOST)):
            folder = run.bench.folder / "caches" / run.recipe.name / str(host)
            first = host * RANKS_PER_HOST
            ranks = range(first, min(run.ranks, first + RANKS_PER_HOST))
            with mock.patch.dict(os.environ, MUSTER_CACHE=str(folder)):
                run.keepers += in_parallel(partial(_start_rank, run), ranks, PARALLEL)
        claim_attempt(run.storage, run.driver, {})
        assert fetch_newest(run.storage, run.bench.folder / "none") is None
        events = Events(run.storage, run.attempt, "rank0")
        devices = ["NVIDIA H100 80GB HBM3"] * run.ranks
        read = {"bytes_read": 2**30, "bytes_fetched": 2**30, "peak_host_bytes": 2**30}
        load = [{"rank": rank, **read} for rank in range(run.ranks)]
        started = StartEvent(step=0, hosts=run.hosts, pids=tuple(range(run.ranks)), devices=tuple(devices), load=load)
        events.emit(dataclasses.replace(started, world_size=run.ranks, driver=run.driver))
        events.close()
    return requests


def _start_rank(run: Run, rank: int) -> Keeper:
    """Does what `launcher.attempt` and `trainer.worker.attempt` do with the storage, without the model's tensors."""
    read_claims(run.storage)  # trainer.logs.rank
    keeper = Keeper(run.storage.url, run.attempt, rank, os.getpid(), run.ranks)
    data = open_data(run.recipe, run.storage, run.shared.child(layout.PREPARED))
    cache, _ = open_caches(data.train, data.eval, run.recipe.data.cache_bytes)
    fetch_model(run.recipe.model)
    stream = Stream.of(run.recipe, data.train, run.storage, cache=cache)
    stream.read_step(stream.step(stream.start()), rank, run.ranks)
    if cache is not None:
        cache.close()
    keeper.add(b"attempt 1, rank %d\n" % rank)
    keeper.store()
    return keeper


# steady state and the driver


class Driven(NamedTuple):
    """What the driver's process has used: requests, CPU seconds, and the seconds of each call of its loop."""

    requests: Requests
    cpu_s: float
    polls_s: list[float]
    wall_s: float


def steady(bench: Bench) -> list[Row]:
    """Steps of a second; each rank logs a line every 10 s; no checkpoints, no tracker, no ledger."""
    found = {ranks: _steady(bench.run(ranks)) for ranks in bench.ranks}
    per_minute = [(r + d.requests.count) / ranks * 60 / WINDOW_S for ranks, (r, _, d) in found.items()]
    logs = [logs / ranks * 60 / WINDOW_S for ranks, (_, logs, _) in found.items()]
    drivers = [driven for *_, driven in found.values()]
    polls = [f"{statistics.fmean(d.polls_s) * 1e3:.1f} ({max(d.polls_s) * 1e3:.0f})" for d in drivers]
    per_second = [f"{p * ranks / 60:.1f}" for p, ranks in zip(per_minute, found, strict=True)]
    return [
        Row("requests per second, all ranks and the driver", per_second),
        Row("requests per rank and minute", [f"{p:.2f}" for p in per_minute], "≤ 1"),
        Row("of these for logs", [f"{p:.2f}" for p in logs]),
        Row("of these by the driver, all", [f"{d.requests.count * 60 / WINDOW_S:.0f} a minute" for d in drivers]),
        Row("driver's loop, ms per poll, mean (worst)", polls),
        Row("driver, % of a core", [f"{d.cpu_s / d.wall_s:.1%}" for d in drivers], "≤ 5 %"),
    ]


def _steady(run: Run) -> tuple[int, int, Driven]:
    """Returns the requests of the ranks, those of them for logs, and the driver's part."""
    assert run.keepers, "the part `start` comes first"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_drive, args=(run.storage.url, run.recipe, run.attempt, theirs))
    process.start()
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        driver = ours.recv()
        lines = JsonLinesWriter(run.storage, layout.metrics_part(run.attempt))
        stack.callback(lines.close)
        with run.bench.meter.counting() as requests, StopPoller(run.storage, driver, enabled=True):
            logs = pool.submit(_log, run.keepers)
            for step in range(1, round(WINDOW_S / STEP_S) + 1):
                lines.add(run.row(step).to_row())
                time.sleep(STEP_S)
            logged = logs.result()
        driven: Driven = ours.recv()
        process.join()
    return requests.count, logged, driven


def _log(keepers: Sequence[Keeper]) -> int:
    """Adds a line per rank and ``LOG_EVERY_S``, and stores the logs as often as each keeper does. Returns the number of
    parts that were written."""
    ranks, began, written = len(keepers), time.monotonic(), 0
    due = [(LOG_EVERY_S * rank / ranks, rank, False) for rank in range(ranks)]
    due += [(write_interval_s(rank, ranks, FLUSH_S) * rank / ranks, rank, True) for rank in range(ranks)]
    heapq.heapify(due)
    grown = [True] * ranks
    with ThreadPoolExecutor(PARALLEL) as pool:
        while due[0][0] < WINDOW_S:
            at, rank, stores = heapq.heappop(due)
            time.sleep(max(0.0, began + at - time.monotonic()))
            if stores:
                written += grown[rank]
                grown[rank] = False
                pool.submit(keepers[rank].store)
                again_s = write_interval_s(rank, ranks, FLUSH_S)
            else:
                keepers[rank].add(LINE)
                grown[rank] = True
                again_s = LOG_EVERY_S
            heapq.heappush(due, (at + again_s, rank, stores))
    return written


def _drive(url: str, recipe: Recipe, attempt: int, pipe: Any) -> None:
    """In a process of its own: what `launcher.driver` does while the workers train, with made-up nodes."""
    resources, hosts = recipe.resources, -(-recipe.resources.max_workers // RANKS_PER_HOST)
    total = {"CPU": 64.0 * RANKS_PER_HOST, "GPU": float(RANKS_PER_HOST)}
    nodes = [Node(f"node{h}", f"host{h:04d}", f"10.0.0.{h}", True, total, total) for h in range(hosts)]
    polls: list[float] = []
    with metered() as meter:
        run = open_storage(url)
        lease = Lease.acquire(run)
        policy = ResizePolicy(resources, partial(missing, resources))
        group = partial(newest_group, run, attempt - 1)
        lines = ProgressLines(lambda text, style: None)
        following = lines.training(run, attempt - 1, 10**6, driver=lease.driver)
        with following as show, NodeMonitor(policy, lambda: nodes, group, lambda reason: None) as monitor:
            show()  # the start is read once
            pipe.send(lease.driver)
            began, cpu = time.monotonic(), time.process_time()
            with meter.counting() as requests:
                while time.monotonic() - began < WINDOW_S:
                    poll = time.perf_counter()
                    show()
                    monitor.check()
                    polls.append(time.perf_counter() - poll)
                    time.sleep(POLL_S)
            driven = Driven(requests, time.process_time() - cpu, polls, time.monotonic() - began)
        lease.release("interrupted")
    pipe.send(driven)


# checkpoints


def commits(bench: Bench) -> list[Row]:
    """A commit that deletes the oldest of four checkpoints, by rank 0 alone. With ``data.ledger``, each rank writes its
    part before."""
    plain = [_commit(bench.run(ranks)) for ranks in bench.ranks]
    both = [commit.count + _ledger(bench.run(ranks)).count for ranks, commit in zip(bench.ranks, plain, strict=True)]
    return [
        Row("requests at a commit, in all", [f"{c.count}" for c in plain], "≤ 64"),
        Row("the same with `data.ledger`", [f"{n:,}" for n in both], "≤ 64"),
    ]


def _commit(run: Run) -> Requests:
    run.claim()
    retention = Retention(run.storage, run.attempt, keep_last=KEEP_LAST)
    events = Events(run.storage, run.attempt, "rank0")
    for step in range(1, KEEP_LAST + 3):
        with run.bench.meter.counting() as requests:
            unique, files = put_checkpoint(run.storage, run.bench.checkpoint, attempt=run.attempt, step=step)
            made = uuid.uuid4().hex, unique, files, {"total_steps": 10**6}, datetime.now(UTC).isoformat()
            record = CommitRecord(step, run.attempt, run.driver, *made)
            commit(run.storage, record)
            retention.apply(record)
            events.emit(
                CheckpointEvent(step=step, uri=unique, stall_s=0.0, snapshot_s=0.0, upload_s=1.0, bytes=1, coalesced=0)
            )
    events.close()
    return requests


def _ledger(run: Run) -> Requests:
    """A second flush: the first one also looks for older parts."""
    sample = {"attempt": 1, "step": 1, "micro_batch": 0, "samples": ["0/0/0"] * 16, "tokens": 32768}
    writers = [
        JsonLinesWriter(run.storage, layout.ledger_part(run.attempt, rank), flush_s=3600.0) for rank in range(run.ranks)
    ]

    def settle(writer: JsonLinesWriter) -> None:
        writer.add(sample)
        writer.flush(strict=True)

    in_parallel(settle, writers, PARALLEL)
    with run.bench.meter.counting() as requests:
        in_parallel(settle, writers, PARALLEL)
    in_parallel(JsonLinesWriter.close, writers, PARALLEL)
    return requests


def restore(bench: Bench) -> list[Row]:
    """Rank 0 and the first rank of each other host fetch the newest checkpoint."""
    counts = [_restore(bench.run(ranks)) for ranks in bench.ranks]
    size = sum(ADAPTER_FILES.values())
    return [
        Row("requests at a restore, all ranks", [f"{c.count:,}" for c in counts]),
        Row("bytes received / bytes of the checkpoint", [f"{c['received'] / size:.1f}" for c in counts]),
    ]


def _restore(run: Run) -> Requests:
    folder = Path(tempfile.mkdtemp(dir=run.bench.folder))
    first = [rank for rank, host in enumerate(run.hosts) if run.hosts.index(host) == rank]
    with run.bench.meter.counting() as requests:
        record = fetch_newest(run.storage, folder / "0", needed=tuple(ADAPTER_FILES))
        assert record is not None, "the part `commits` comes first"
        in_parallel(lambda rank: fetch(run.storage, record, folder / str(rank)), first[1:], PARALLEL)
    return requests


# the process group's store


class SimulatedWorld(World):
    """One of ``size`` ranks; the others are simulated too, so that a gathered value is made up of this rank's."""

    @property
    def host(self) -> str:
        return f"host{self.rank // RANKS_PER_HOST:04d}"


def heartbeats(bench: Bench) -> list[Row]:
    """Pulses of all ranks in a TCPStore, as `trainer.worker.hang_detector` exchanges them."""
    found = [_heartbeat(ranks) for ranks in bench.ranks]
    busy = [
        beat_s * ranks / BEAT_S + look_s * _looks(ranks)
        for ranks, (beat_s, look_s) in zip(bench.ranks, found, strict=True)
    ]
    return [
        Row("heartbeat: a look at all ranks, p50", [f"{look_s * 1e3:.1f} ms" for _, look_s in found]),
        Row("looks per second, all ranks", [f"{_looks(ranks):.0f}" for ranks in bench.ranks]),
        Row("all beats and looks of a second, one after the other", [f"{s:.2f} s" for s in busy], "≤ 1 s"),
    ]


def _looks(ranks: int) -> float:
    return sum(1 / max(BEAT_S, look_interval_s(rank, ranks)) for rank in range(ranks))


def _heartbeat(ranks: int) -> tuple[float, float]:
    """Returns the seconds of a beat and of a look, over one connection."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    detectors = [
        HangDetector(SimulatedWorld(r, ranks, r % RANKS_PER_HOST, CPU), store, lambda found: None) for r in range(ranks)
    ]
    beats, looks = list[float](), list[float]()
    for detector in detectors:
        beats.append(_timed(detector.beat))
    for detector in detectors[:5]:
        detector.look()
        looks.append(_timed(detector.look))
    assert len(detectors[0].seen()) == ranks
    return statistics.median(beats), statistics.median(looks)


def rendezvous(bench: Bench) -> list[Row]:
    """Ranks as threads. Joining: each connects to rank 0's store, waits for all, and reads the addresses of all. Mesh:
    a gloo group is formed, with a connection between each pair of ranks."""
    stay_on_loopback()
    meshes = [f"{_mesh(ranks):.2f} s" if ranks <= LARGEST_MESH else "" for ranks in bench.ranks]
    return [
        Row("rendezvous: all join rank 0's store", [f"{_join(ranks):.2f} s" for ranks in bench.ranks]),
        Row("gloo's mesh of connections", meshes),
    ]


def _together(ranks: int, member: Callable[[int], Any]) -> float:
    """Returns the seconds until ``member(rank)`` has returned for each rank, all in threads."""
    with ThreadPoolExecutor(ranks) as pool:
        began = time.perf_counter()
        kept = list(pool.map(member, range(ranks)))  # a group that is freed ends its peers' connections
        took_s = time.perf_counter() - began
        del kept
    return took_s


def _join(ranks: int) -> float:
    """The quickest of ``TRIES``: without DNS, torch's look-up of a client's name takes up to 10 s at times."""
    keys = [f"address/{rank}" for rank in range(ranks)]

    def member(port: int, rank: int) -> Any:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
        store.set(keys[rank], "10.0.0.1:29500".ljust(128))
        store.wait(keys)
        store.multi_get(keys)
        return store

    tries = []
    for _ in range(TRIES):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        tries.append(_together(ranks, partial(member, server.port)))
    return min(tries)


def _mesh(ranks: int) -> float:
    """The ranks exchange their addresses in memory: the store is measured above."""
    store = dist.HashStore()
    return _together(ranks, lambda rank: dist.ProcessGroupGloo(store, rank, ranks, PATIENCE))


class Asked:
    """A worker as Ray Train's controller sees it."""

    def poll_status(self) -> dict[str, Any]:
        return {"running": True, "error": None, "training_result": None}


def controller(bench: Bench) -> list[Row]:
    """A call to each worker and its reply, in the process that calls: most of what Ray Train's controller does. A few
    actors stand for all workers."""
    import ray

    ray.init(address="local", num_cpus=RAY_ACTORS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        actors = [ray.remote(Asked).remote() for _ in range(RAY_ACTORS)]
        ray.get([actor.poll_status.remote() for actor in actors])
        cpu_s = {ranks: min(_ask(ray, actors, ranks) for _ in range(TRIES)) for ranks in bench.ranks}
    finally:
        ray.shutdown()
    every_s = {ranks: health_check_interval_s(ranks) for ranks in bench.ranks}
    return [
        Row("Ray's controller: CPU of asking all workers", [f"{s * 1e3:.0f} ms" for s in cpu_s.values()]),
        Row("seconds between two rounds", [f"{s:g} s" for s in every_s.values()]),
        Row("Ray's controller, % of a core", [f"{s / every_s[ranks]:.1%}" for ranks, s in cpu_s.items()], "≤ 5 %"),
    ]


def _ask(ray: Any, actors: Sequence[Any], ranks: int) -> float:
    """Returns the CPU seconds of one round."""
    began = time.process_time()
    asked = [actors[rank % len(actors)].poll_status.remote() for rank in range(ranks)]
    ray.wait(asked, num_returns=len(asked))
    for one in asked:
        ray.get(one)
    return time.process_time() - began


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# goodput, computed


def young_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Returns the best seconds of training between two checkpoints, to first order: sqrt(2 · stall · MTBF).

    Young 1974, doi:10.1145/361147.361115."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Returns the same to a higher order. With x = stall / (2 · MTBF), Young's interval is multiplied by
    1 + sqrt(x) / 3 + x / 9, and the stall is subtracted; if x ≥ 1, it is the MTBF.

    Daly 2006, doi:10.1016/j.future.2004.11.016."""
    half = stall_s / (2 * mtbf_s)
    if half >= 1:
        return mtbf_s
    return young_interval_s(stall_s, mtbf_s) * (1 + math.sqrt(half) / 3 + half / 9) - stall_s


def goodput(interval_s: float, stall_s: float, restart_s: float, mtbf_s: float) -> float:
    """Returns the share of the time that is training which counts, with failures at random (a Poisson process), which
    may also come during a stall or a restart:
    interval / (MTBF · exp(restart / MTBF) · (exp((interval + stall) / MTBF) - 1)).

    Daly 2006, for a long run."""
    lost = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + stall_s) / mtbf_s)
    return interval_s / lost


HOUR_S = 3600.0
NODE_MTBF_H = (6300.0, 1000.0)
STALL_S, RESTART_S = 5.0, 300.0
NODES = (8, 64, 256, 1024)


def goodput_table() -> list[str]:
    """The lines of a table: nodes, MTBF, the best interval, and the goodput with it and with two fixed intervals."""
    head = "| MTBF of a node | nodes | MTBF of the job | Young | Daly | goodput | at 10 min | at 1 h |"
    lines = [head, "|---" * 8 + "|"]
    for node_h in NODE_MTBF_H:
        for nodes in NODES:
            mtbf_s = node_h * HOUR_S / nodes
            best = daly_interval_s(STALL_S, mtbf_s)
            shares = [goodput(s, STALL_S, RESTART_S, mtbf_s) for s in (best, 600.0, HOUR_S)]
            times = f"{mtbf_s / HOUR_S:,.1f} h | {young_interval_s(STALL_S, mtbf_s) / 60:.1f} min | {best / 60:.1f} min"
            lines.append(f"| {node_h:,.0f} h | {nodes:,} | {times} | {' | '.join(f'{s:.1%}' for s in shares)} |")
    return lines


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    f.__name__: f for f in (start, steady, commits, restore, heartbeats, rendezvous, controller)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what grows with the number of ranks.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "goodput", []], help="all without one")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    given = parser.parse_args()
    chosen = given.parts or [*PARTS, "goodput"]
    logging.disable(logging.WARNING)
    if measured := [part for part in PARTS if part in chosen or (part == "start" and "steady" in chosen)]:
        print(f"| ranks | {' | '.join(f'{n:,}' for n in given.ranks)} | aim |")
        print("|---" * (len(given.ranks) + 2) + "|", flush=True)
        with tempfile.TemporaryDirectory(prefix="muster-benchmark-") as folder, serve() as s3, metered() as meter:
            os.environ.update(s3.env)
            s3.reset()
            bench = Bench(Path(folder), meter, given.ranks)
            for part in measured:
                for row in PARTS[part](bench):
                    print(f"| {row.what} | {' | '.join(row.figures)} | {row.aim} |", flush=True)
    if "goodput" in chosen:
        print("\n" + "\n".join(goodput_table()), flush=True)


if __name__ == "__main__":
    main()
