"""``muster rm`` and ``muster gc``: delete runs, and what no run uses."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.text import Text

from launcher.cli import completion
from launcher.terminal.console import stderr
from trainer.errors import UsageError
from trainer.progress.texts import age, plural, size

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]


def rm(
    run_uris: Annotated[
        list[str],
        typer.Argument(metavar="RUN_URI...", help="runs, as muster ls prints them", autocompletion=completion.runs),
    ],
    yes: YesOption = False,
) -> None:
    """Delete runs with their checkpoints and adapters. A run that is running is refused. Prepared data, which runs
    share, stay: see muster gc. The name of a sweep deletes its runs and its records."""
    from launcher.cleanup.stored_run import delete_run, find_run
    from trainer.run.sweep import parts_at
    from trainer.storage import locate

    parts = [part for uri in run_uris for part in parts_at(uri.rstrip("/"))]
    found = [find_run(*locate(uri)) for uri in dict.fromkeys(parts)]
    for one in found:
        what = f"{one.state}, {plural(one.checkpoints, 'checkpoint')}, {plural(len(one.objects), 'object')}"
        _say(f"{one.run.url}: {what}, {size(one.bytes)}")
        if one.others:
            _say(f"  stays: {plural(len(one.others), 'object')} of others, e.g. {one.run.uri(one.others[0])}")
    if _confirmed(f"delete {plural(len(found), 'run')}?", yes):
        for one in found:
            _say(f"deleted {one.run.url}: {plural(delete_run(one), 'object')}")


def gc(
    storage: Annotated[
        str,
        typer.Argument(
            metavar="STORAGE_URI", help="the storage of a recipe, e.g. s3://runs", autocompletion=completion.runs
        ),
    ],
    yes: YesOption = False,
) -> None:
    """Delete the prepared data and models that no run uses. What is younger than a day is kept: a run that begins may
    use it."""
    from launcher.cleanup.unused import delete_unused, find_unused
    from trainer.storage import open_storage

    place = open_storage(storage)
    found = find_unused(place)
    for note in found.notes:
        _say(note)
    for folder in found.folders:
        _say(f"{size(folder.bytes):>9}, {age(folder.age_s):>6} old: {place.uri(folder.key)}")
    _say(f"kept: {found.named} in use, {found.young} younger than a day")
    if not found.folders:
        _say(f"nothing in {place.url} is unused")
    elif _confirmed(f"delete {size(sum(f.bytes for f in found.folders))}?", yes):
        for folder in found.folders:
            gone = delete_unused(place, folder)
            _say(f"{'deleted' if gone else 'kept, as a run uses it now:'} {place.uri(folder.key)}")


def _confirmed(question: str, yes: bool) -> bool:
    """Returns the answer of the person at the terminal. Raises UsageError where there is none to ask."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError("nothing is deleted: there is no terminal to ask on; give --yes")
    if typer.confirm(question, err=True):
        return True
    _say("nothing is deleted")
    return False


def _say(text: str) -> None:
    stderr().print(Text(text), soft_wrap=True)
