"""The end of a command: its exit code, and its failure as a sentence on stderr.

0: done; 1: failed; 2: the recipe, the command line or an input is wrong; 3: interrupted, and resumable.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from launcher.terminal.console import own_streams
from trainer.errors import Interrupted, MusterError, RecipeError, StartAgain
from trainer.interruption import CODE, current
from trainer.terminal import shown

KEYBOARD = 130
"""The exit code that typer makes of a KeyboardInterrupt."""


def print_error(error: MusterError) -> None:
    kind = "interrupted" if isinstance(error, Interrupted) else "error"
    print(shown(f"muster: {kind}: {error_text(error)}"), file=sys.stderr)


def carried_out(command: Callable[[], int | None], report: Callable[[MusterError], None] = print_error) -> int:
    """Calls a command, gives its failure to ``report``, and returns its exit code; the process must end afterwards.
    After a signal, any error counts as its consequence: other processes may have received the signal too."""
    current.command("the same command does it again")
    try:
        with own_streams():
            code = _code_of(command, report)
            if code:
                sys.exit(code)  # a failed command keeps its exit code if nobody reads its output
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    current.settle(code)
    return code


def _code_of(command: Callable[[], int | None], report: Callable[[MusterError], None]) -> int:
    try:
        return command() or 0
    except MusterError as error:
        if current.heard:
            interrupted = isinstance(error, Interrupted)
            current.leave(error_text(error) if interrupted else f"{current.sentence()} ({error.cause})")
        report(error)
        return exit_code(error)
    except SystemExit as ended:
        if current.heard and ended.code:
            current.leave()
        if ended.code == KEYBOARD:
            print("muster: interrupted", file=sys.stderr)
            return CODE
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        if current.heard:
            current.leave()
        if not isinstance(error, Exception):
            raise
        print(shown(traceback.format_exc()), end="", file=sys.stderr)
        return 1


def exit_code(error: MusterError) -> int:
    """Returns the error's exit code. ``MUSTER_AGAIN`` may name another code for a run that should be started again, for
    a script that manages the job."""
    again = os.environ.get("MUSTER_AGAIN", "")
    return int(again) if isinstance(error, StartAgain) and again.isdecimal() else error.exit_code


def error_text(error: MusterError, path: str | None = None) -> str:
    """Returns the error's message, which begins with the ``path`` of its recipe unless it names the lines there."""
    if isinstance(error, RecipeError):
        count = len(error.mistakes)
        return f"{error}\n{count} mistakes" if count > 1 else str(error)
    return f"{path}: {error}" if path else str(error)
