"""Observes the environment of training workers: an optimizer of the user's own notes what its process has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.training import small_recipe, write_pairs
from trainer.recipe import Recipe

OPTIMIZER = """
import json, os
import torch
from huggingface_hub import constants

class Own(torch.optim.AdamW):
    def __init__(self, *given, **settings):
        super().__init__(*given, **settings)
        begun_with = dict(pair.split("=", 1) for pair in open("/proc/self/environ").read().split("\\0") if "=" in pair)
        seen = {"hub": constants.HF_HOME, "now": os.environ["NCCL_DEBUG"], "start": begun_with.get("NCCL_DEBUG")}
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(json.dumps(seen) + "\\n")
"""


def noting_recipe(name: str, model: Path, folder: Path, workers: int) -> Recipe:
    """A recipe whose workers note their environment. ``folder`` has to be on PYTHONPATH."""
    write_pairs(folder / "data" / "a.jsonl", 30)
    (folder / "noting.py").write_text(OPTIMIZER)
    variables = {"HF_HOME": str(folder / "hub"), "NCCL_DEBUG": "WARN", "NOTES": str(folder / "notes")}
    changes = {
        "training.steps": 2,
        "optimizer": {"name": "noting:Own", "lr": 1e-3},
        "cluster": {"env": variables},
        "resources": {"workers": workers},
    }
    return small_recipe(name, model, folder, **changes)


def notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]
