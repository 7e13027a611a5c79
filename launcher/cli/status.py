"""``muster status``, ``ls``, ``logs``, ``report`` and ``track``: read runs from their storage, on any machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from launcher.cli.options import Overrides, RunUri
from launcher.terminal.console import print_json, stderr, stdout
from trainer.interruption import current

CONTINUES = "the run itself continues"
MOST_COMPARED, MOST_SETTINGS = 50, 4
"""`ls` compares the recipes of so many runs unasked, which takes a second, and shows so many differing settings."""
LOOK_DEADLINE_S = 15.0  # of commands that only read: a person waits
REPORT_DEADLINE_S = 60.0


def status(
    run_uri: RunUri,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object on stdout; with --watch, a line per change")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="update until the run has ended, or Ctrl-C")] = False,
) -> None:
    """Show what a run is doing, or the trials of a sweep, from the storage alone."""
    from launcher.monitor.status import read_status
    from launcher.monitor.tables import checkpoint_lines
    from trainer.run.sweep import sweep_instead
    from trainer.storage import open_storage

    if (sweep := sweep_instead(run_uri, deadline_s=LOOK_DEADLINE_S)) is not None:
        from launcher.sweep.ending import show_trials

        show_trials(*sweep, None if as_json else stdout())
        return
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
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="show these: settings (lr, adapter.rank) and metrics (eval_loss)"),
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="NAME", help="order by this, lowest first; -NAME: highest first")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON list on stdout")] = False,
) -> None:
    """List the runs in a storage, with the settings in which they differ."""
    from launcher.monitor.compare import ListedRun, cell, differing, ordered, short_name, values_of, with_settings
    from launcher.monitor.status import list_runs
    from launcher.monitor.tables import chosen_table, runs_table
    from trainer.storage import open_storage

    home = open_storage(storage, deadline_s=LOOK_DEADLINE_S)
    found = list_runs(home)
    if not found:
        print_json([]) if as_json else stderr().print(Text(f"there is no run in {storage}"), soft_wrap=True)
        return
    names = [name.strip() for name in (columns or "").split(",") if name.strip()]
    compares = not (names or as_json) and len(found) <= MOST_COMPARED
    reads = names or sort or compares
    runs = with_settings(home, found) if reads else [ListedRun(run, {}) for run in found]
    runs = ordered(runs, sort) if sort else runs
    chosen = {name: values_of(name, runs) for name in names}
    found = [run.status for run in runs]
    if as_json:
        more = [{name: values[at] for name, values in chosen.items()} for at in range(len(runs))]
        print_json([s.to_json() | ({"columns": row} if row else {}) for s, row in zip(found, more, strict=True)])
    elif chosen:
        shown = [(name, [cell(value) for value in values]) for name, values in chosen.items()]
        stdout().print(chosen_table(found, [("state", [run.state for run in found]), *shown]))
    else:
        recipes = [run.settings for run in runs]
        keys = differing(recipes)
        few = keys if len(keys) <= MOST_SETTINGS else []
        differences = [(short_name(key, recipes), [cell(recipe.get(key)) for recipe in recipes]) for key in few]
        console = stdout()
        console.print(runs_table(found, time.time(), differences, console.width))
        if len(keys) > len(few):
            text = f"the recipes differ in {len(keys)} settings; --columns shows some: {','.join(keys)}"
            stderr().print(Text(text), soft_wrap=True)


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


def report(
    run_uris: Annotated[
        list[str], typer.Argument(metavar="RUN_URI...", help="a run, or several to compare; a sweep: its runs")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="file of the page; default: NAME.html of the first run"),
    ] = None,
) -> None:
    """Write one HTML page about runs: curves, timeline, goodput, data, recipe."""
    from launcher.report import report as write
    from launcher.report.reading import read_runs
    from trainer.errors import UsageError
    from trainer.run.sweep import runs_at

    found = [run for uri in dict.fromkeys(run_uris) for run in runs_at(uri, deadline_s=REPORT_DEADLINE_S)]
    runs = read_runs(list(dict.fromkeys(found)), REPORT_DEADLINE_S)
    target = output or Path(f"{runs[0].status.name}.html")
    text = write(runs)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}; name another file with -o") from None
    print(target)


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
