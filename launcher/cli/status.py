"""``muster status``, ``ls``, ``logs`` and ``track``: read a run from its storage, on any machine."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.text import Text

from launcher.cli.options import Overrides, RunUri
from launcher.terminal.console import print_json, stderr, stdout
from trainer.interruption import current

CONTINUES = "the run itself continues"
LOOK_DEADLINE_S = 15.0  # of commands that only read: a person waits


def status(
    run_uri: RunUri,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object on stdout; with --watch, a line per change")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="update until the run has ended, or Ctrl-C")] = False,
) -> None:
    """Show what a run is doing, from its storage alone."""
    from launcher.monitor.status import read_status
    from launcher.monitor.tables import checkpoint_lines
    from trainer.storage import open_storage

    run = open_storage(run_uri, deadline_s=LOOK_DEADLINE_S)
    found = read_status(run)
    if watch:
        from launcher.monitor.watch import watch_json, watch_run

        current.command(CONTINUES)
        watch_json(run, print) if as_json else watch_run(run, stdout())
    elif as_json:
        from launcher.monitor.goodput import goodput_of

        went = goodput_of(run, until=found.heard_at, running=found.state == "running")
        print_json({**found.to_json(), "goodput": went.to_json()})
    else:
        from launcher.monitor.watch import Watch, print_failure

        console, looked = stdout(), Watch(run)
        console.print(looked.render(console.width))
        print_failure(looked, console)
        for line in checkpoint_lines(found):
            console.print(line, soft_wrap=True)


def list_(
    storage: Annotated[str, typer.Argument(metavar="STORAGE_URI", help="the storage of a recipe, e.g. s3://runs")],
    as_json: Annotated[bool, typer.Option("--json", help="a JSON list on stdout")] = False,
) -> None:
    """List the runs in a storage."""
    from launcher.monitor.status import list_runs
    from launcher.monitor.tables import runs_table
    from trainer.storage import open_storage

    found = list_runs(open_storage(storage, deadline_s=LOOK_DEADLINE_S))
    if as_json:
        print_json([s.to_json() for s in found])
    elif not found:
        stderr().print(Text(f"there is no run in {storage}"), soft_wrap=True)
    else:
        stdout().print(runs_table(found, time.time()))


def logs(
    run_uri: RunUri,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="only this rank")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="this attempt; default: the newest")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="continue until the run has ended, or Ctrl-C")] = False,
) -> None:
    """Print what the ranks of an attempt have printed."""
    from launcher.monitor.logs import follow_logs, print_logs
    from trainer.storage import open_storage

    run = open_storage(run_uri, deadline_s=LOOK_DEADLINE_S)
    current.command(CONTINUES)
    show = follow_logs if follow else print_logs
    show(run, rank, attempt, sys.stdout.buffer)


def track(
    run_uri: RunUri,
    overrides: Overrides = None,
) -> None:
    """Send the metrics of a run that has ended to its recipe's trackers. What they have already is not sent again."""
    from launcher.monitor.status import read_state
    from trainer.errors import UsageError
    from trainer.run.frozen import read_recipe
    from trainer.storage import open_storage
    from trainer.tracking import check_trackers, send_all

    run = open_storage(run_uri)
    recipe = read_recipe(run, overrides or [])
    if not recipe.tracking:
        raise UsageError(f"the recipe of {run.url} names no tracker; name one: muster track {run_uri} tracking=[wandb]")
    if (state := read_state(run)) == "running":
        raise UsageError(f"{run.url} is running, and its driver sends the metrics itself; wait for its end")
    check_trackers(recipe)
    for name, points in send_all(recipe, run, state).items():
        stderr().print(Text(f"{name}: {points:,} rows of metrics sent"), soft_wrap=True)
