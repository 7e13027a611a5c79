"""Fine-tuning from Python and notebooks: ``import muster``.

    recipe = muster.Recipe.load("my.yaml", **{"optimizer.lr": 1e-4})
    print(muster.plan(recipe, gpu_memory="24GiB"))
    run = muster.run(recipe)
    run.metrics()

Errors are those of the command line: each is a `MusterError`, whose text is for the user.
"""

from __future__ import annotations

from launcher.python.planning import plan
from launcher.python.stored_run import Run
from launcher.python.training import run
from trainer.errors import (
    CorruptObject,
    InputError,
    Interrupted,
    MusterError,
    RecipeChanged,
    RecipeError,
    RunHeld,
    StorageError,
    UsageError,
    WorkerFailed,
)
from trainer.recipe import Recipe

__all__ = [
    "CorruptObject",
    "InputError",
    "Interrupted",
    "MusterError",
    "Recipe",
    "RecipeChanged",
    "RecipeError",
    "Run",
    "RunHeld",
    "StorageError",
    "UsageError",
    "WorkerFailed",
    "plan",
    "run",
]
