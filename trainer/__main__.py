"""``torchrun … -m trainer RUN_URI | RECIPE``: trains a run of ``muster run``, or the run of a recipe, without Ray.

Rank 0 is the run's driver: it takes the lease and renews it. Every rank handles SIGTERM, SIGINT, SIGHUP and SIGUSR1 (a
scheduler's warning): one signal to one rank ends the attempt with a commit and exit code 3. Before the first step there
is nothing to commit, and the rank exits at once. torchrun does not pass on its ranks' exit codes, so rank 0 writes its
own into the file that ``MUSTER_EXIT_FILE`` names, unless it died or failed with an unexpected exception.
"""

from __future__ import annotations

from trainer.interruption import CODE, RESUMES, STARTS, Terminated, current

if __name__ == "__main__":
    current.begin()  # the other imports take a moment

import argparse
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint import read_claims
from trainer.checkpoint.publish import completed_text, finished
from trainer.errors import InputError, Interrupted, MusterError
from trainer.fast_imports import mute_libraries
from trainer.inference.server_of_recipe import shared_servers
from trainer.logs.rank import rank_log
from trainer.progress.ending import last_lines
from trainer.progress.lines import ProgressLines, called_often
from trainer.recipe import Recipe
from trainer.recipe.trust import FLAG
from trainer.run import layout
from trainer.run.frozen import check_same_recipe, freeze_recipe, has_commits, resumed_recipe
from trainer.run.lease import Lease, check_not_cancelled
from trainer.run.recipe_url import is_recipe, recipe_at
from trainer.run.startup_phases import DATA, IMPORT, Phases, process_began
from trainer.storage import Storage, open_storage
from trainer.terminal import ShownFormatter, shown
from trainer.torchrun_failure import RankFailed, RunRank, explain_failure
from trainer.worker.held_run import hold_run
from trainer.worker.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.run_data import RunData

PREPARED_WAIT_S = 3600.0
POLL_S = 0.5
LOADING = "loading the model"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m trainer", description="Train a run without Ray.")
    parser.add_argument("run", metavar="RUN_URI|RECIPE", help="a run, as `muster ls` prints it, or a recipe's file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes, by dotted path")
    parser.add_argument("--takeover", action="store_true", help="take the run from a driver that still holds it")
    parser.add_argument(FLAG, action="store_true", dest="trust", help="run the Python code that a stored recipe names")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(ShownFormatter())
    current.command(STARTS)
    current.on_force(_leave_code_of_signal)
    code = 0
    try:
        _run(options.run, options.overrides, takeover=options.takeover, trust=options.trust)
    except (KeyboardInterrupt, Terminated):
        current.leave()
    except MusterError as error:
        if current.heard and isinstance(error, Interrupted):
            current.leave(str(error))
        # Otherwise torchrun may have sent the signal itself, because another rank had died.
        print(shown(f"muster: {error}"), file=sys.stderr, flush=True)
        code = error.exit_code
        if isinstance(error, RankFailed):
            return code  # without an exit file, like a killed rank
    except Exception:
        print(shown(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        return 1
    _leave_code(code)
    current.settle(code)
    return code


def _leave_code_of_signal() -> None:
    # torchrun also sends SIGTERM when another rank has died; then it starts the ranks again.
    if current.heard != "SIGTERM" or current.asked:
        _leave_code(CODE)


def _leave_code(code: int) -> None:
    if (exit_file := os.environ.get("MUSTER_EXIT_FILE")) and _rank() == 0:
        Path(exit_file).write_text(str(code))


def _run(place: str, overrides: list[str], *, takeover: bool, trust: bool) -> None:
    stop = Stop()
    recipe, storage, run = _find(place, overrides, trust=trust)
    if has_commits(run):
        current.command(RESUMES)
    if last := finished(run, recipe.training):
        if _rank() == 0:
            print(f"muster: {run.url} {completed_text(last)}; its adapter is {run.uri(layout.ADAPTER)}")
            _print_end(recipe, run)
        return
    shared_servers(recipe)  # raises for servers that Ray would have to place
    _import_libraries()
    if _rank() == 0:
        _drive(storage, run, recipe, stop, takeover=takeover)
    else:
        total = _await_data(recipe, run, storage)
        _train(Job(storage.url, 0, recipe, total, {}), stop, RunRank(run, recipe, _rank(), None))


def _find(place: str, overrides: list[str], *, trust: bool) -> tuple[Recipe, Storage, Storage]:
    """Returns the recipe, its storage and its run, and sets the recipe's environment variables. Raises RecipeChanged if
    the run was started with another recipe."""
    if is_recipe(place):
        recipe = recipe_at(place, overrides, trust=trust)
        if recipe.adapters:
            raise InputError("adapters: runs together are started by `muster run`, also for one worker without Ray")
        os.environ.update(recipe.cluster.env)
        storage = open_storage(recipe.storage)
        run = storage.child(recipe.name)
        check_same_recipe(run, recipe)
        return recipe, storage, run
    folder, _, name = place.rstrip("/").rpartition("/")
    storage = open_storage(folder or ".")
    recipe = resumed_recipe(storage.child(name), overrides, trust=trust)
    os.environ.update(recipe.cluster.env)
    return recipe, storage, storage.child(name)


def _drive(storage: Storage, run: Storage, recipe: Recipe, stop: Stop, *, takeover: bool) -> None:
    """Prepares the data if necessary, trains, and records the end in the lease. Rank 0 only."""
    check_not_cancelled(run, _job())
    lease = Lease.acquire(run, job=_job(), takeover=takeover)
    with hold_run(recipe, run, lease):
        phases, progress = Phases(process_began()), ProgressLines(_line_printer())
        phases.end(IMPORT)
        with called_often(progress.repeat):
            progress.phase("preparing data")
            data = _prepare(recipe, run, storage, progress)
        progress.data(data)
        freeze_recipe(run, recipe, lease.driver)
        holder = {"host": lease.holder.host, "pid": lease.holder.pid, "by": "torchrun"}
        phases.end(DATA)
        job = Job(storage.url, lease.driver, recipe, data.total_steps, holder, phases.spent())

        def stop_requested() -> bool:
            return stop() or lease.lost.is_set() or lease.asked.is_set()

        before = read_claims(run).attempt
        followed = progress.training(run, before, data.total_steps, lambda: LOADING, driver=lease.driver)
        with followed as show, called_often(show), called_often(progress.repeat):
            _train(job, stop_requested, RunRank(run, recipe, 0, lease.driver))
    print(f"muster: finished; the adapter is {run.uri(layout.ADAPTER)}")
    _print_end(recipe, run)


def _print_end(recipe: Recipe, run: Storage) -> None:
    for line in last_lines(recipe, run, run.uri(layout.ADAPTER)):
        print(shown(line), flush=True)


def _train(job: Job, stop_requested: Callable[[], bool], of: RunRank) -> None:
    from trainer.worker.attempt import train

    try:
        with rank_log(of.run, of.rank, int(os.environ.get("WORLD_SIZE", "1"))):
            train(job, stop_requested)
    except Interrupted:
        raise
    except Exception as error:
        raise explain_failure(error, of) from error


def _line_printer() -> Callable[[str, str], None]:
    """Returns a function that prints a line on standard error as it is now; later, the rank's log takes that."""
    terminal = os.fdopen(os.dup(2), "w")

    def write(text: str, style: str) -> None:
        with suppress(OSError):  # nobody reads it
            print(shown(text), file=terminal, flush=True)

    return write


def _prepare(recipe: Recipe, run: Storage, storage: Storage, progress: ProgressLines) -> RunData:
    from trainer.data.run_data import prepare_data
    from trainer.model import fetch_model, load_tokenizer

    def tokenizer() -> PreTrainedTokenizerBase:
        files = fetch_model(recipe.model, weights=False)
        return load_tokenizer(files.folder, trust_remote_code=recipe.model.trust_remote_code)

    prepared = storage.child(layout.PREPARED)
    return prepare_data(recipe, run, prepared, tokenizer, on_progress=progress.prepared)


def _await_data(recipe: Recipe, run: Storage, storage: Storage) -> int:
    """Waits until rank 0 has prepared the data; returns the number of steps. The other ranks join the process group
    only then, so that no rank waits for a tokenizer in a collective."""
    from trainer.data.run_data import try_open_data

    deadline = time.monotonic() + PREPARED_WAIT_S
    while time.monotonic() < deadline:
        data = try_open_data(recipe, run, storage.child(layout.PREPARED))
        if data is not None:
            return data.total_steps
        time.sleep(POLL_S)
    raise InputError(f"rank 0 has not prepared the data of {run.url} within {PREPARED_WAIT_S:.0f} s")


class Stop:
    """Returns whether a signal requests the end; called after each step. From the first call on a commit is possible,
    and a signal does not raise any more."""

    def __init__(self) -> None:
        self._requested = threading.Event()

    def __call__(self) -> bool:
        current.command(RESUMES)
        current.ask_first(lambda name: self._requested.set())
        return self._requested.is_set()


def _import_libraries() -> None:
    """Imports the libraries, which takes seconds, once the environment that they read is set. Turns off their progress
    bars and notices, which would appear once per rank."""
    mute_libraries()
    from transformers.utils import logging as transformers_logging

    import trainer.worker.attempt  # noqa: F401

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _job() -> str | None:
    """Returns the same name as the driver on Ray, so that a requeued Slurm job takes over its own run at once."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"slurm:{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    slurm = os.environ.get("SLURM_JOB_ID")
    return f"slurm:{slurm}" if slurm else None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
