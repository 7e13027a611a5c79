"""``muster report``: show runs in one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEADLINE_S = 60.0


def report(
    run_uris: Annotated[list[str], typer.Argument(metavar="RUN_URI...", help="a run, or several to compare")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="file of the page; default: NAME.html of the first run"),
    ] = None,
) -> None:
    """Write one HTML page about runs: curves, timeline, goodput, data, recipe."""
    from launcher.report import report as write
    from launcher.report.reading import read_runs
    from trainer.errors import UsageError

    runs = read_runs(list(dict.fromkeys(run_uris)), DEADLINE_S)
    target = output or Path(f"{runs[0].status.name}.html")
    text = write(runs)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}; name another file with -o") from None
    print(target)
