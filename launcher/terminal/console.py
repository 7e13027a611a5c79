"""The streams that commands write to: results to stdout, everything for a person to stderr.

All texts of a stream pass through one place: `own_streams` replaces ``sys.stdout`` and ``sys.stderr``, and `stdout` and
`stderr` return consoles that draw on them. People see neither control characters nor credentials; a program that reads
stdout gets a text as it is.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TextIO, cast

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from trainer.redact import clean, redact, redactor
from trainer.terminal import COLOUR, neutralise, neutralise_output

PLAIN_WIDTH = 200
READER_GONE = 141
"""Exit code when nobody reads stdout any more: what a shell says of a program that SIGPIPE has ended."""


class TerminalStream:
    """Replaces ``sys.stdout`` or ``sys.stderr`` while a command runs; ``raw`` is the stream behind it."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def write(self, text: str) -> int:
        with self._pipe():
            self.raw.write(self._shown(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._pipe():
            self.raw.flush()

    def _shown(self, text: str) -> str:
        raise NotImplementedError

    def _gone(self) -> None:
        """Called after a write has failed because the reader has closed the stream."""

    @contextmanager
    def _pipe(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            _forget(self.raw)
            self._gone()


class Results(TerminalStream):
    """Standard output. On a terminal control characters are shown and do not act; elsewhere a text stays as it is. When
    its reader has gone (``| head -1``), there is nothing more to do for it: the command ends, without a word."""

    @property
    def buffer(self) -> BinaryIO:
        return cast(BinaryIO, Bytes(self))

    def _shown(self, text: str) -> str:
        return neutralise(text) if self.raw.isatty() else text

    def _gone(self) -> None:
        raise SystemExit(READER_GONE)


class MessageStream(TerminalStream):
    """Standard error, as libraries and Python itself write to it; the command continues without a reader."""

    def _shown(self, text: str) -> str:
        text = redact(text)
        return neutralise_output(text) if self.raw.isatty() else text


class Bytes:
    """Bytes on standard output: the logs of ranks. On a terminal, a line that was drawn again and again is shown as it
    was last, and without its colours."""

    def __init__(self, stream: Results) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data: bytes) -> int:
        from trainer.logs.parts import last_states

        if self._stream.raw.isatty():
            self._stream.write(COLOUR.sub("", self._decoder.decode(last_states(data))))
        else:
            with self._stream._pipe():
                self._stream.raw.flush()
                self._stream.raw.buffer.write(data)
        return len(data)

    def flush(self) -> None:
        with self._stream._pipe():
            self._stream.raw.flush()


@contextmanager
def own_streams() -> Iterator[None]:
    """Puts `Results` and `MessageStream` in place for the time of the block. At its end both are flushed, while a
    missing reader can still be reported: the interpreter would complain and end with an exit code of its own."""
    before = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, Results(before[0])) if before[0] is not None else before[0]
    sys.stderr = cast(TextIO, MessageStream(before[1])) if before[1] is not None else before[1]
    try:
        yield
    finally:
        ended = sys.exc_info()[1]
        try:
            for stream in filter(None, (sys.stderr, sys.stdout)):
                stream.flush()
        except SystemExit:
            if not isinstance(ended, SystemExit) or not ended.code:  # what has failed keeps its own code
                raise
        finally:
            sys.stdout, sys.stderr = before


class Console(rich.console.Console):
    """Draws for people. Texts are text, not rich's markup."""

    def __init__(self, stream: TextIO, *, results: bool, **settings: Any) -> None:
        raw = getattr(stream, "raw", stream) if isinstance(stream, TerminalStream) else stream
        super().__init__(file=raw, highlight=False, markup=False, emoji=False, **settings)
        self._results = results
        self._redact = redactor().text

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Shows every text without what acts or is secret, those inside of tables included."""
        if isinstance(renderable, str):
            renderable = self._shown(renderable)
        elif isinstance(renderable, Text) and (text := self._shown(renderable.plain)) != renderable.plain:
            renderable = renderable.copy()
            renderable.plain = text
        return super().render(renderable, options)

    def _shown(self, text: str) -> str:
        return neutralise(self._redact(text))

    def on_broken_pipe(self) -> None:
        _forget(self.file)
        if self._results:
            raise SystemExit(READER_GONE)


def stderr() -> Console:
    plain = bool(os.environ.get("CI")) or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
    width = PLAIN_WIDTH if plain else None
    return Console(sys.stderr, results=False, force_terminal=False if plain else None, width=width)


def stdout(width: int | None = None) -> Console:
    return Console(sys.stdout, results=True, width=width)


def print_json(value: Any) -> None:
    """A result for programs, on one line. Credentials are taken out of its strings, so that it stays JSON."""
    print(json.dumps(clean(value)), flush=True)


@contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on a terminal, and nothing elsewhere. Yields a function of the number done and the total."""
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
    # A filter, since DeepSpeed sets the level when it is imported: by accelerate, to save a model.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def _forget(stream: Any) -> None:
    """Leads the stream nowhere, so that what its buffer holds cannot fail again when the interpreter ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
