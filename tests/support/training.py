"""Training in gloo processes without Ray or torchrun: small recipes on the tiny model, several per set of processes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.ranks import run_ranks
from trainer.data.run_data import prepare_data
from trainer.recipe import Recipe, parse
from trainer.run import layout
from trainer.run.frozen import freeze_recipe
from trainer.run.jsonl import read_rows
from trainer.run.lease import Lease
from trainer.storage import Storage, open_storage

PHRASES = ("the baker sells bread", "a ferry crosses the sound", "rain fell on the hills", "who keeps the lighthouse")


def write_pairs(path: Path, rows: int) -> None:
    """Deterministic prompt/completion rows of differing lengths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"prompt": f"Q{i}: {PHRASES[i % 4]}?", "completion": " ".join(["", *PHRASES[: 1 + i % 4], f"{i}."])}
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def small_recipe(name: str, model: Path, folder: Path, /, **changes: Any) -> Recipe:
    """A recipe over ``folder/data/*.jsonl`` into ``folder/runs``, without samples; dotted keys change it."""
    recipe: dict[str, Any] = {
        "name": name,
        "model": {"path": str(model), "dtype": "float32"},
        "adapter": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": [{"path": f"{folder}/data/*.jsonl", "format": "completion"}],
            "sequence_length": 64,
            "ledger": True,
        },
        "training": {"steps": 10, "global_batch": 6, "micro_batch": 2},
        "optimizer": {"name": "adamw", "lr": 5e-3},
        "strategy": {"kind": "ddp"},
        "storage": str(folder / "runs"),
        "checkpoint": {"every_steps": 5},
        "samples": {"count": 0},
    }
    for key, value in changes.items():
        node, *path = [recipe, *key.split(".")]
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = copy.deepcopy(value)  # a later key may change it
    return parse(recipe)


def train_in_processes(recipes: Sequence[Recipe], world_size: int) -> None:
    """Trains each recipe's run on ``world_size`` gloo processes, one run after the other in the same processes."""
    run_ranks(train_rank, world_size, list(recipes))


def train_rank(rank: int, recipes: Sequence[Recipe]) -> None:
    """One rank's part, in a process that has joined the group."""
    for recipe in recipes:
        _train(recipe, first=rank == 0)


def _train(recipe: Recipe, *, first: bool) -> None:
    import torch.distributed as dist

    from trainer.errors import Interrupted
    from trainer.worker.attempt import train
    from trainer.worker.job import Job

    storage = open_storage(recipe.storage)
    run = storage.child(recipe.name)
    box: list[Any] = [None]
    lease = Lease.acquire(run) if first else None
    if lease:
        box = [(lease.driver, prepare(recipe, storage).total_steps)]
        freeze_recipe(run, recipe, lease.driver)
    dist.broadcast_object_list(box)
    driver, total = box[0]
    state = "succeeded"
    try:
        train(Job(recipe.storage, driver, recipe, total, {}), lambda: False)
    except Interrupted:
        state = "interrupted"
    if lease:
        lease.release(state)


def train_here(recipe: Recipe, stop_requested: Callable[[], bool] = lambda: False, *, takeover: bool = False) -> str:
    """Trains the recipe's run in this process, as the one rank there is; returns the state that it ended in.
    ``takeover``: from a holder of the run that seems alive."""
    from trainer.errors import Interrupted
    from trainer.worker.attempt import train
    from trainer.worker.job import Job

    storage = open_storage(recipe.storage)
    run = storage.child(recipe.name)
    lease = Lease.acquire(run, takeover=takeover)
    state = "failed"
    try:
        total = prepare(recipe, storage).total_steps
        freeze_recipe(run, recipe, lease.driver)
        train(Job(recipe.storage, lease.driver, recipe, total, {}), stop_requested)
        state = "succeeded"
    except Interrupted:
        state = "interrupted"
    finally:
        lease.release(state)
    return state


def prepare(recipe: Recipe, storage: Storage) -> Any:
    from trainer.model import fetch_model, load_tokenizer

    def tokenizer() -> Any:
        return load_tokenizer(fetch_model(recipe.model).folder)

    return prepare_data(recipe, storage.child(recipe.name), storage.child(layout.PREPARED), tokenizer)


def run_of(recipe: Recipe) -> Storage:
    return open_storage(recipe.storage).child(recipe.name)


def losses(recipe: Recipe) -> dict[int, float]:
    """{step: loss} of the highest attempt that executed each step."""
    rows = [r for r in read_rows(run_of(recipe), layout.METRICS) if "loss" in r]
    return {r["step"]: r["loss"] for r in sorted(rows, key=lambda r: (r["attempt"], r["step"]))}


def ledger(recipe: Recipe) -> dict[tuple[int, int], list[str]]:
    """{(step, micro-batch): samples} of the attempts that count."""
    rows = read_rows(run_of(recipe), layout.LEDGER)
    last: dict[int, int] = {}
    for row in rows:
        last[row["step"]] = max(last.get(row["step"], 0), row["attempt"])
    fed: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        if row["attempt"] == last[row["step"]]:
            key = (row["step"], row["micro_batch"])
            assert key not in fed, f"micro-batch {key} was fed twice"
            fed[key] = row["samples"]
    return fed


def adapter_bytes(recipe: Recipe) -> bytes:
    name = "model.safetensors" if recipe.adapter.method == "none" else "adapter_model.safetensors"
    return run_of(recipe).read(f"{layout.ADAPTER}/{name}")
