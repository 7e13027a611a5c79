"""What commands write to a person: on stderr, so that stdout has results alone."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_WIDTH = 200


def stderr() -> Console:
    plain = bool(os.environ.get("CI")) or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
    width = PLAIN_WIDTH if plain else None
    return Console(stderr=True, highlight=False, force_terminal=False if plain else None, width=width)


@contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere. Yields what is told how many are done, and of how many."""
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def hush_libraries() -> None:
    """They report heads that are not in the base's files, which the adapter brings, and kernels that are not called."""
    import transformers

    for name in ("transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
