"""``muster.run``: trains in a process of its own, and shows its progress."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from launcher.python.notebook import NotebookDisplay, in_notebook
from launcher.python.stored_run import Run
from trainer import errors
from trainer.errors import Interrupted, MusterError, UsageError, WorkerFailed
from trainer.interruption import RESUMES
from trainer.recipe import Recipe, dump

ROOT = Path(__file__).resolve().parents[2]
LOOK_S = 0.5


def run(
    recipe: Recipe,
    *,
    on: str | None = None,
    address: str | None = None,
    takeover: bool = False,
    detach: bool = False,
) -> Run:
    """Trains a recipe to its end, or resumes it from its newest checkpoint, as ``muster run`` does; returns the run.

    The progress is written to stderr; in a notebook, it is shown below the cell with the curve of the loss. Ctrl-C, or
    the notebook's interrupt, makes the workers commit and end. ``on``: ``local``, ``ray``, ``slurm`` or ``kubernetes``;
    ``address``: of a Ray cluster; ``takeover``: takes the run over from a driver that still holds it; ``detach``: does
    not wait for a submitted job.

    Raises UsageError for what the user can fix, Interrupted for a run that can be resumed, and other MusterErrors for a
    run that failed."""
    if recipe.adapters:
        raise UsageError("adapters: several runs together are trained by the command `muster run`; leave them out here")
    options = {"--on": on, "--address": address}
    flags = {"--takeover": takeover, "--detach": detach}
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    with tempfile.TemporaryDirectory(prefix="muster-run-") as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(dump(recipe), encoding="utf-8")
        words = ["run", str(file), *words, *(name for name, given in flags.items() if given)]
        _drive(words, recipe.run_uri, Path(folder, "error"))
    return Run(recipe.run_uri)


def _drive(words: list[str], run_uri: str, error: Path) -> None:
    """Waits for the process to end; raises its error, which it writes to the file ``error``."""
    shown = in_notebook()
    driver = subprocess.Popen(
        [sys.executable, "-m", "launcher.python", str(error), *words],
        stdin=subprocess.PIPE,  # closed when this process ends, however it ends
        stderr=subprocess.PIPE if shown else None,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
        process_group=0,  # a Ctrl-C on a terminal reaches it through `_ended` only
    )
    display = NotebookDisplay(run_uri, driver.stderr) if driver.stderr is not None else None
    try:
        code = _ended(driver, display)
    finally:
        if driver.stdin is not None:
            driver.stdin.close()
        if display:
            display.close()
    if error.is_file():
        raise _read(error)
    if code == Interrupted.exit_code:
        raise Interrupted(f"interrupted; {RESUMES}")
    if code:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise WorkerFailed(f"the driver {how}; the same recipe resumes from the newest checkpoint")


def _read(file: Path) -> MusterError:
    told = json.loads(file.read_text(encoding="utf-8"))
    kind, arguments = getattr(errors, told["error"], MusterError), told["arguments"]
    if kind is errors.RecipeError:
        arguments = [tuple(errors.Mistake(*mistake) for mistake in arguments[0])]
    raised: MusterError = kind(*arguments)
    return raised


def _ended(driver: subprocess.Popen[bytes], display: NotebookDisplay | None) -> int:
    """Waits for the end, and returns the exit code. Passes an interruption of this process on: the first asks the
    workers to commit, the second ends the driver at once."""
    while True:
        try:
            while True:
                try:
                    return driver.wait(LOOK_S)
                except subprocess.TimeoutExpired:
                    if display:
                        display.look()
        except KeyboardInterrupt:
            driver.send_signal(signal.SIGINT)
