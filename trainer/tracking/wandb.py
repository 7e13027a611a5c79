"""Weights & Biases, online or offline. All attempts of a run are one W&B run, by its id.

W&B's own records cannot be read offline, and online it accepts no step before its last one. So the mark in the run's
storage decides where the curve continues. A new driver begins a new file of the same run, and offline there is one
folder per driver, which `wandb sync` joins by that id.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.recipe import Recipe
from trainer.redact import clean
from trainer.storage import Storage, local_path
from trainer.tracking.base import Point, TrackedRun, Watermark

SETTINGS = {
    # A tracker gets only metrics, not the output, the arguments or the machine of the process.
    "console": "off",
    "silent": True,
    "disable_git": True,
    "save_code": False,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "init_timeout": 60.0,
    "finish_timeout": 20.0,
    # The default is 15 s, and a driver that is killed loses the points that were not written.
    "x_transaction_log_flush_interval": 2.0,
}


class Wandb:
    """The W&B tracker of one curve; see `trainer.tracking.base.Tracker`."""

    def __init__(self, curve: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.check(curve.recipe)
        section = curve.recipe.wandb
        # W&B may drop settings whose names begin with x_ in any version.
        known = wandb.Settings.model_fields
        settings: dict[str, Any] = {n: v for n, v in SETTINGS.items() if not n.startswith("x_") or n in known}
        self._run: Any = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            dir=folder_of(curve.recipe, curve.run),
            id=curve.id,
            name=curve.recipe.name,
            group=section.group,
            tags=list(section.tags),
            config=clean(curve.recipe.model_dump(mode="json")),
            allow_val_change=True,  # resources and strategy may change between attempts
            resume="allow" if section.mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(**settings),
        )

    @staticmethod
    def check(recipe: Recipe) -> None:
        if recipe.wandb.mode != "online":
            return
        import wandb

        # prompt=False: on a terminal W&B would otherwise request a key, and wait.
        if not wandb.login(prompt=False, verify=False):
            raise InputError(
                "tracking names wandb, and there is no key for it: set WANDB_API_KEY, run `wandb login`, or write "
                "wandb.mode: offline"
            )

    def last_mark(self) -> Watermark | None:
        return None

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(point.named(), step=point.step)

    def close(self, state: str) -> None:
        self._run.finish(exit_code=1 if state == "failed" else 0)


def folder_of(recipe: Recipe, run: Storage) -> str:
    """Returns the folder in which W&B makes its own folder ``wandb``. Creates it."""
    if recipe.wandb.folder is None and (path := local_path(run.url)) is not None:
        chosen = Path(path)
    else:
        chosen = Path(recipe.wandb.folder or os.environ.get("WANDB_DIR") or ".").expanduser().absolute()
    chosen.mkdir(parents=True, exist_ok=True)
    return str(chosen)
