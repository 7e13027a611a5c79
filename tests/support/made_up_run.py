"""A run that never was, as its storage would look: killed, resized and resumed, on hosts of which one is slow."""

from __future__ import annotations

import math
from typing import Any

from trainer.data.blocks import Counts
from trainer.data.summary import Bin, Summary
from trainer.run import layout
from trainer.run.jsonl import JsonLinesWriter
from trainer.run.lease import Holder, LeaseRecord, to_row
from trainer.storage import Storage

GROUPS = ("loss", "samples", "machine", "data", "recipe")
CHARTS = (
    "loss-curve", "eval-loss", "learning-rate", "gradient-norm", "throughput", "memory", "step-times", "ranks",
    "checkpoints", "goodput", "timeline", "sources", "lengths",
)  # fmt: skip
CARDS = (
    *(*CHARTS[:4], "samples-0", *CHARTS[4:11], "events", "hosts"),
    *("sources", "lengths", "recipe-text", "versions"),
)
"""Of a report's page, by their ids."""
BEGAN = 1_700_000_000.0
TRACE = "trainer/worker/loop.py:17, in _update\n    <step>(lr)"
ADVICE = "the host's memory was full: ask for more"
VERSIONS = {"muster": "0.1.0", "python": "3.11", "torch": "2.13.0", "transformers": "5.23.0"}
SPENT = {"import": 2.0, "ray": 3.0, "data": 1.0, "workers": 4.0, "model": 5.0, "first_step": 3.0}
RECIPE = """name: {name}
model: {{path: org/<model>}}
data:
  train: [{{path: s3://AKIA1:hush-hush@data/pairs.jsonl, format: completion}}]
cluster: {{token: not-for-your-eyes}}
seed: 3
"""


def make_up(run: Storage, *, lr: float = 1e-4, ended: str = "succeeded", scale: int = 1) -> None:
    """Attempt 1 is killed after step 30 and saved 20; 2 continues with fewer workers and is resized at 60; 3 ends at
    80. With ``scale`` each of these numbers of steps is so many times as large."""
    name = run.url.rsplit("/", 1)[-1]
    run.write(layout.RECIPE, RECIPE.format(name=name).encode())
    packages = {name: VERSIONS[name] for name in ("torch", "transformers")}
    run.write_json(layout.PROVENANCE, {"muster": "0.1.0+abc", "packages": packages, "python": "3.11", "host": "a"})
    killed = {"event": "failure", "cause": "<b>killed</b>", "rank": 3, "host": "b", "trace": TRACE, "advice": ADVICE}
    resized = {"event": "resize", "reason": "c has joined"}
    at = _attempt(run, 1, (0, 30), BEGAN, ["a", "a", "b", "b"], lr, killed, scale)
    at = _attempt(run, 2, (20, 60), at + 9, ["a", "a", "b"], lr, resized, scale)
    end = {"event": "end", "state": ended, "step": 80 * scale}
    at = _attempt(run, 3, (60, 80), at + 4, ["a", "a", "b", "c"], lr, end, scale)
    holder = Holder("a", "boot/1", 4711, 1000.0, None)
    run.write_json(layout.LEASE, to_row(LeaseRecord(1, ended, holder, at + 1.0, 7)))


def _attempt(
    run: Storage,
    number: int,
    between: tuple[int, int],
    at: float,
    hosts: list[str],
    lr: float,
    stop: dict[str, Any],
    scale: int,
) -> float:
    """Returns when it ended."""
    steps = range(between[0] * scale + 1, between[1] * scale + 1)
    events = JsonLinesWriter(run, layout.events_part(number, "rank0"))
    rows = JsonLinesWriter(run, layout.metrics_part(number))
    head = {"attempt": number, "writer": "rank0"}
    begun = {"hosts": hosts, "world_size": len(hosts), "strategy": {"kind": "ddp"}, "build_s": 4.0, "restore_s": 1.0}
    begun |= {"driver": 1, "devices": ["H100" if host == "c" else "A100" for host in hosts]}
    begun |= {"versions": VERSIONS if number < 3 else {**VERSIONS, "torch": "2.14.0"}}
    events.add({**head, "event": "start", "time": at + 15, "step": steps[0] - 1, **begun})
    now, stall = at + 18.0, 0.0
    events.add({**head, "event": "startup", "time": now, "seconds": SPENT, "total_s": 18.0})
    for step in steps:
        took = 2.0 + 0.2 * math.sin(step)
        now += (took if step > steps[0] else 0.0) + stall
        compiled = {"compile_s": 1.0} if step == steps[0] else {}
        trained = _step(step, took, hosts, lr, scale)
        rows.add({"attempt": number, "time": now, **trained, "stall_s": stall, **compiled})
        stall = 0.0
        if step % (20 * scale) == 0:
            now += 3.0
            evaluated = {"eval_loss": 1 + 2 / (step / scale) ** 0.5, "eval_s": 3.0}
            rows.add({"attempt": number, "time": now, "step": step, **evaluated})
        if step % (10 * scale) == 0 and (number > 1 or step <= 20 * scale):
            stall = 0.4
            done = {"step": step, "stall_s": 0.4, "snapshot_s": 0.3, "upload_s": 1.5, "bytes": 9 << 20, "coalesced": 0}
            events.add({**head, "event": "checkpoint", "time": now + 2, **done})
        if step in (1, 80 * scale):
            shown = {"prompt": "Q: <script>alert(1)</script>", "text": f"as of {step}", "reference": "", "reward": 0.5}
            events.add({**head, "event": "texts", "time": now, "step": step, "texts": [shown]})
    events.add({**head, "time": now + 2.5, **stop})
    events.close()
    rows.close()
    return now + 2.5


def _step(step: int, took: float, hosts: list[str], lr: float, scale: int) -> dict[str, Any]:
    """The last rank's own work takes 1.5 times as long."""
    share = step / scale
    own = [took * 0.5] * (len(hosts) - 1) + [took * 0.75]
    return {
        "step": step,
        "total_steps": 80 * scale,
        "epoch": 0,
        "loss": 1 + 2 / share**0.5 + 3000 * lr * math.cos(step) / 10,
        "lr": lr * min(1.0, share / 10),
        "grad_norm": 1 / share**0.5,
        "tokens_per_s": 4096 / took,
        "step_s": took,
        "rank_s": own,
        "world_size": len(hosts),
        "samples": 8 * step,
        "memory_bytes": (4 << 30) + (step << 20),
        "memory_rank": 1,
    }


COUNTS = (
    ("train", "s3://data/<pairs>.jsonl", Counts(1000, 990, 120_000, 60_000, 12, 8, 2)),
    ("train", "s3://data/chat.parquet", Counts(500, 500, 90_000, 70_000, 0, 0, 0)),
    ("eval", "s3://data/held-out.jsonl", Counts(50, 50, 6_000, 3_000, 0, 0, 0)),
)
WORDS = Summary([Bin(10, 20, 700), Bin(21, 31, 300)], 18, 29, 31, 120, 0.93)
