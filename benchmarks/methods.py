"""Every adapter method at its defaults on the same model and data: ``python benchmarks/methods.py [--markdown]``.

About five minutes on two cores.

The model is the quickstart's: a Llama of 0.7 M parameters that has read statements about people, and is tuned on
questions about them; the held-out questions ask for facts that only the base has read about. Every method runs in a
process of its own, on one rank without a GPU, with its default settings. A model this small wants larger steps than the
ones that the defaults are made for: each method gets its own rate times 16.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.memory import peak_mib  # noqa: E402
from launcher.quickstart.prepare import prepare_base, prepare_data  # noqa: E402
from tests.support.training import run_of, small_recipe, train_here  # noqa: E402
from trainer.recipe.methods import METHODS  # noqa: E402
from trainer.run import layout  # noqa: E402
from trainer.run.jsonl import read_rows  # noqa: E402

STEPS = 30
TIMES = 16
FULL_LR = 5e-5
BY_NAME = {"peft": "MISS"}
COLUMNS = {
    "method": "method",
    "lr": "rate",
    "trainable": "trained parameters",
    "kib": "adapter, KiB",
    "peak": "peak memory, MiB",
    "ms": "ms per step",
    "loss": "held-out loss",
}


def recipe_of(method: str, rate: float, folder: Path) -> Any:
    return small_recipe(
        f"{method}-{rate:g}".replace("_", "-"),
        folder / "base",
        folder,
        **{
            "adapter": {"method": BY_NAME if method == "peft" else method},
            "data.train": [{"path": f"{folder}/data/*.jsonl", "format": "completion"}],
            "data.eval": [{"path": f"{folder}/eval/*.jsonl", "format": "completion"}],
            "data.sequence_length": 128,
            "data.ledger": False,
            "training": {"steps": STEPS, "global_batch": 8, "micro_batch": 8, "gradient_checkpointing": False},
            "optimizer.lr": rate,
            "schedule": {"name": "cosine", "warmup_steps": 5},
            "checkpoint.every_steps": STEPS,
        },
    )


def measured(method: str, rate: float, folder: Path) -> dict[str, Any]:
    recipe = recipe_of(method, rate, folder)
    train_here(recipe)
    run = run_of(recipe)
    rows = read_rows(run, layout.METRICS)
    start = next(e for e in read_rows(run, layout.EVENTS) if e["event"] == "start")
    files = [o for o in run.list(layout.ADAPTER) if o.key.endswith(".safetensors")]
    return {
        "method": "peft: MISS" if method == "peft" else method,
        "lr": f"{rate:.0e}",
        "trainable": f"{start['trainable_parameters']:,}",
        "kib": f"{sum(o.size for o in files) / 1024:,.0f}",
        "ms": f"{1000 * statistics.median(r['step_s'] for r in rows if 'step_s' in r):.0f}",
        "loss": f"{min(r['eval_loss'] for r in rows if 'eval_loss' in r):.3f}",
    }


def peaked(method: str, folder: Path) -> dict[str, Any]:
    """Called in the method's own process, whose peak of memory is told."""
    rate = FULL_LR if method == "none" else METHODS[method].lr
    return {**measured(method, rate * TIMES, folder), "peak": f"{peak_mib():.0f}"}


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fork, whose memory begins as this process's."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def prepare(folder: Path) -> None:
    prepare_base(folder / "base")
    prepare_data(folder / "data", folder / "eval")


def line(cells: list[str], *, markdown: bool) -> str:
    if markdown:
        return f"| {' | '.join(cells)} |"
    return f"{cells[0]:16}" + "".join(f"{cell:>20}" for cell in cells[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="as in docs/methods.md")
    parser.add_argument("--folder", type=Path, help="where model, data and runs are kept, made when they are not there")
    given = parser.parse_args()
    print(line(list(COLUMNS.values()), markdown=given.markdown))
    if given.markdown:
        print(line(["---"] * len(COLUMNS), markdown=True))
    with tempfile.TemporaryDirectory(prefix="methods-") as name:
        folder = given.folder or Path(name)
        in_process(prepare, folder)
        for method in METHODS.names():
            row = in_process(peaked, method, folder)
            print(line([row[key] for key in COLUMNS], markdown=given.markdown), flush=True)


if __name__ == "__main__":
    main()
