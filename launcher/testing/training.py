"""Small runs in this process, without Ray or torchrun, and what they left."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.data.run_data import prepare_data
from trainer.recipe import Recipe, parse
from trainer.run import layout
from trainer.run.frozen import freeze_recipe
from trainer.run.jsonl import read_rows
from trainer.run.lease import Lease
from trainer.storage import Storage, open_storage

PHRASES = ("the baker sells bread", "a ferry crosses the sound", "rain fell on the hills", "who keeps the lighthouse")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON Lines, with the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(path: Path, rows: int) -> None:
    """Deterministic prompt/completion rows of differing lengths."""
    lines = [
        {"prompt": f"Q{i}: {PHRASES[i % 4]}?", "completion": " ".join(["", *PHRASES[: 1 + i % 4], f"{i}."])}
        for i in range(rows)
    ]
    write_rows(path, lines)


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


def adapter_bytes(recipe: Recipe) -> bytes:
    name = "model.safetensors" if recipe.adapter.method == "none" else "adapter_model.safetensors"
    return run_of(recipe).read(f"{layout.ADAPTER}/{name}")
