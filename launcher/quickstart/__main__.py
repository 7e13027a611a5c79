"""``python -m launcher.quickstart [KEY=VALUE…]``, from the project's root: the quickstart.

Makes a small base model and data, fine-tunes it with ``muster run recipes/quickstart.yaml``, and shows what changed.
Overrides are passed to the run. A second call resumes the run; if the run is finished, it only shows the result.
"""

from __future__ import annotations

from trainer.interruption import Terminated, current

if __name__ == "__main__":
    current.begin()  # before the other imports, which take a second

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from launcher.quickstart import prepare
from launcher.quickstart.answers import answers, right
from launcher.quickstart.chart import draw, losses
from launcher.quickstart.corpus import questions
from launcher.terminal.console import Console, hush_libraries, stdout
from trainer.progress.lines import ProgressLines, called_often
from trainer.progress.program import program
from trainer.recipe import Recipe, load
from trainer.run import layout
from trainer.storage import Storage, open_storage

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
SHOWN = 4
MOST_WORKERS = 2


def main(overrides: Sequence[str]) -> int:
    """Runs the complete quickstart; returns the exit code of the run."""
    console, started = stdout(), time.monotonic()
    lines = ProgressLines(lambda text, style: console.print(Text(text, style=style), soft_wrap=True))
    with called_often(lines.repeat):
        lines.phase("loading torch and transformers")
        hush_libraries()
        overrides = [*for_this_machine(), *overrides]
        recipe = load(RECIPE, overrides)
        prepare.make_inputs(recipe, lines)
        console.rule(" ".join(["muster run recipes/quickstart.yaml", *overrides]))
        code = call([sys.executable, "-m", "launcher", "run", str(RECIPE), *overrides])
        if code == 0:
            run = open_storage(recipe.run_uri)
            show_curve(console, run)
            lines.phase("answering the held-out questions")
            show_answers(console, recipe, run)
            lines.phase("")
            show_next(console, recipe, time.monotonic() - started)
    return code


def for_this_machine() -> list[str]:
    """Returns overrides of the recipe: a GPU for each worker, if this machine has any."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"resources.workers={min(gpus, MOST_WORKERS)}", "resources.gpus_per_worker=1"] if gpus else []


def call(command: Sequence[str]) -> int:
    """Runs the command; returns its exit code. Passes signals on, and waits while the command commits a checkpoint."""
    process = subprocess.Popen(command)
    try:
        with current.asking(lambda name: process.send_signal(signal.Signals[name])):
            return process.wait()
    except (KeyboardInterrupt, Terminated):
        process.terminate()
        return process.wait()


def show_curve(console: Console, run: Storage) -> None:
    from trainer.run.jsonl import read_metrics
    from trainer.run.metrics import EvalMetrics, StepMetrics

    rows = read_metrics(run)
    trained = losses((row.attempt, row.step, row.loss) for row in rows if isinstance(row, StepMetrics))
    evaluated = losses((row.attempt, row.step, row.eval_loss) for row in rows if isinstance(row, EvalMetrics))
    console.rule("loss over target tokens")
    for line in draw(trained, width=max(min(console.width - 16, 72), 20)):
        console.print(line)
    for step, value in evaluated:
        console.print(f"step {step:>4}: loss on held-out questions {value:.3f}")


def show_answers(console: Console, recipe: Recipe, run: Storage) -> None:
    """Prints held-out questions with the answers of the base model, without and with the adapter."""
    held_out, base = questions(prepare.SEED)[1], Path(recipe.model.path)
    with tempfile.TemporaryDirectory() as folder:
        before, after = answers(base, None, held_out), answers(base, fetch_adapter(run, Path(folder)), held_out)
    table = Table("held-out question", "before", "after", "right answer")
    for i in range(0, len(held_out), max(len(held_out) // SHOWN, 1)):
        question = held_out[i].prompt.splitlines()[0].removeprefix("Question: ")
        table.add_row(question, before[i], after[i], held_out[i].completion.strip())
    console.rule("answers, with plain transformers and peft")
    console.print(table)
    counts = f"{right(held_out, before)} before, {right(held_out, after)} after"
    console.print(f"exactly right, of {len(held_out)} held-out questions: {counts}")


def fetch_adapter(run: Storage, folder: Path) -> Path:
    """Downloads the final adapter's files to a local folder; returns the folder."""
    adapter = run.child(layout.ADAPTER)
    for found in adapter.list():
        adapter.download(found.key, folder / Path(found.key).name)
    return folder


def show_next(console: Console, recipe: Recipe, seconds: float) -> None:
    console.rule(f"done in {seconds:.0f} s")
    console.print(f"adapter:  {recipe.run_uri}/{layout.ADAPTER}", soft_wrap=True)
    console.print(f"look:     {program()} status {recipe.run_uri}", soft_wrap=True)
    console.print(f"chat:     {program()} chat --run {recipe.run_uri}", soft_wrap=True)
    console.print("again:    make quickstart (finds this run finished); another name trains again:", soft_wrap=True)
    console.print(
        "          .venv/bin/python -m launcher.quickstart name=second optimizer.lr=1e-3",
        soft_wrap=True,
    )


if __name__ == "__main__":
    from launcher.terminal.exit_codes import carried_out

    sys.exit(carried_out(lambda: main(sys.argv[1:])))
