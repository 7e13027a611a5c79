"""The storage keys of a run. Only this module spells the keys below `<storage>/<name>/`.

recipe.yaml, provenance.json   frozen at the first start
data.json                      which prepared data the run reads
lease                          the driver that is alive
stop                           the driver that is requested to stop
submission, submitted/         the job that was given to a scheduler or cluster for it, and the recipes of such jobs
claims/d000001, claims/000001  drivers and attempts, who may write
commits/<attempt>/<inverted>   one record per committed checkpoint, the only truth
checkpoints/<unique>/          the files that the records name
adapter/                       the final adapter
metrics/ events/ ledger/       JSON Lines in parts
logs/                          what each rank printed, in parts
trackers/                      how far each tracker has received the metrics
tensorboard/, wandb/           files of these trackers; wandb/ only in a folder of this machine
profiles/attempt-…/rank-….…     traces of steps (`trainer.worker.profiler`)
rollouts/000000000012.jsonl.gz  the texts that a step learns from, where they cannot be written again
plan/                          the packing plan, one object per window
"""

from __future__ import annotations

import re

RECIPE = "recipe.yaml"
PROVENANCE = "provenance.json"
DATA = "data.json"
LEASE = "lease"
STOP = "stop"
SUBMISSION = "submission"
SUBMITTED = "submitted"
"""Folder of the recipes as they were submitted, each under a name of its own."""
CLAIMS = "claims"
COMMITS = "commits"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
METRICS = "metrics"
EVENTS = "events"
LEDGER = "ledger"
LOGS = "logs"
TRACKERS = "trackers"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
PLAN = "plan"
PROFILES = "profiles"
ROLLOUTS = "rollouts"
PREPARED = "_data"
"""Prepared data, shared between runs: next to the runs, not inside one."""
MODELS = "_models"
"""Quantised copies of base models, also next to the runs."""
SWEEPS = "_sweeps"
"""The records of sweeps (`trainer.run.sweep`), also next to the runs."""

_OF_A_RUN = frozenset(
    [
        *(RECIPE, PROVENANCE, DATA, LEASE, STOP, SUBMISSION, SUBMITTED, CLAIMS, COMMITS, CHECKPOINTS, ADAPTER),
        *("trials", "best.yaml"),  # in the records of a sweep
        *(METRICS, EVENTS, LEDGER, LOGS, TRACKERS, TENSORBOARD, WANDB, PLAN, PROFILES, ROLLOUTS),
    ]
)
_LAST_STEP = 10**12 - 1


def is_of_run(key: str) -> bool:
    """Returns True if muster writes such a key below a run's folder. Other keys there are somebody else's."""
    return key.partition("/")[0] in _OF_A_RUN


def driver_claim(driver: int) -> str:
    return f"{CLAIMS}/d{driver:06d}"


def attempt_claim(attempt: int) -> str:
    return f"{CLAIMS}/{attempt:06d}"


def commit(attempt: int, step: int) -> str:
    """Returns the record's key. The step is inverted, so that a sorted listing begins with the newest one."""
    if not 0 <= step <= _LAST_STEP:
        raise ValueError(f"step {step} is outside 0 to {_LAST_STEP}")
    return f"{COMMITS}/{attempt:06d}/{_LAST_STEP - step:012d}.json"


def parse_commit(key: str) -> tuple[int, int] | None:
    """Returns (attempt, step) of a record's key, None for any other key."""
    match = re.fullmatch(rf"{COMMITS}/(\d{{6,}})/(\d{{12}})\.json", key)
    return (int(match[1]), _LAST_STEP - int(match[2])) if match else None


def checkpoint(unique: str) -> str:
    return f"{CHECKPOINTS}/{unique}"


def metrics_part(attempt: int) -> str:
    """Returns the prefix of an attempt's metrics parts; `trainer.run.jsonl.JsonLinesWriter` adds the part's number."""
    return f"{METRICS}/a{attempt:06d}"


def events_part(attempt: int, writer: str) -> str:
    return f"{EVENTS}/a{attempt:06d}-{writer}"


def driver_of_events(key: str) -> int | None:
    """Returns the driver's number in the key of an events part that a driver, or a rank in its place, has written
    (``driver2``, ``driver2-controller``); None for any other key."""
    match = re.fullmatch(rf"{EVENTS}/a\d{{6,}}-driver(\d+)(-[a-z]+\d*)?-\d+\.jsonl", key)
    return int(match[1]) if match else None


def ledger_part(attempt: int, rank: int) -> str:
    return f"{LEDGER}/a{attempt:06d}-r{rank:05d}"


def tracker(name: str) -> str:
    return f"{TRACKERS}/{name}.json"


def log_part(attempt: int, rank: int, offset: int) -> str:
    """Returns the key of a log part. ``offset``: how many bytes of the log precede it."""
    return f"{LOGS}/a{attempt:06d}-r{rank:05d}-{offset:012d}.log"


def parse_log_part(key: str) -> tuple[int, int, int] | None:
    """Returns (attempt, rank, offset) of a part's key, None for any other key."""
    match = re.fullmatch(rf"{LOGS}/a(\d{{6,}})-r(\d{{5,}})-(\d{{12,}})\.log", key)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def profile(attempt: int, rank: int) -> str:
    """Returns the key of a rank's trace without its suffix."""
    return f"{PROFILES}/attempt-{attempt:06d}/rank-{rank:05d}"


def rollouts(step: int) -> str:
    return f"{ROLLOUTS}/{step:012d}.jsonl.gz"


def parse_rollouts(key: str) -> int | None:
    """Returns the step of a key of `rollouts`, None for any other key."""
    match = re.fullmatch(rf"{ROLLOUTS}/(\d{{12}})\.jsonl\.gz", key)
    return int(match[1]) if match else None
