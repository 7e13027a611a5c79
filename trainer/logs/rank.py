"""Sends what a rank prints through its keeper for as long as it trains: Python's output, and that of libraries, of
processes that it starts, and of a crash."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.checkpoint import read_claims
from trainer.errors import Interrupted
from trainer.logs.keeper import END
from trainer.storage import Storage

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
START_WAIT_S, END_WAIT_S = 120.0, 15.0
FORMAT = "%(asctime)s %(name)s: %(message)s"


@contextmanager
def rank_log(run: Storage, rank: int) -> Iterator[None]:
    """For the time of the block, standard output and error of this process are kept under the run's ``logs/``, and so
    is what ``trainer`` logs from INFO on. It belongs to the attempt that is claimed next: every rank is here before any
    of them can claim. A log that cannot be kept is a warning; it stops nothing."""
    try:
        redirected = Redirected(run, read_claims(run).attempt + 1, rank)
    except Exception as error:
        log.warning("the log of rank %d is not kept: %s", rank, error)
        yield
        return
    try:
        yield
    except Interrupted as stopped:
        redirected.note(f"{stopped}\n")
        raise
    except BaseException:
        redirected.note(traceback.format_exc())
        raise
    finally:
        redirected.close()


class Redirected:
    """Descriptors 1 and 2 lead to a keeper, which passes on what comes; notes go to the log alone."""

    def __init__(self, run: Storage, attempt: int, rank: int) -> None:
        self._restored = threading.Lock()
        out, err, notes, alive = pipes = tuple(os.pipe() for _ in range(4))
        arguments = [run.url, attempt, rank, os.getpid(), out[0], err[0], notes[0]]
        try:
            started = subprocess.Popen(
                [sys.executable, "-m", "trainer.logs.keeper", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=(out[0], err[0], notes[0], alive[1]),
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            )
            if started.wait(START_WAIT_S) != 0:
                raise OSError(f"its keeper ended with exit code {started.returncode}")
        except (OSError, subprocess.TimeoutExpired):
            for end in (end for pipe in pipes for end in pipe):
                os.close(end)
            raise
        os.close(alive[1])
        os.close(notes[0])
        self._alive, self._reads = alive[0], [out[0], err[0]]
        self._originals = [os.dup(1), os.dup(2)]
        _flush()
        for pipe, descriptor in ((out, 1), (err, 2)):
            os.dup2(pipe[1], descriptor)
            os.close(pipe[1])
        self._lines_at_once()
        self._notes = os.fdopen(notes[1], "w", buffering=1, errors="backslashreplace")
        self._handler = _Notes(self.note)
        self._listen()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="log-keeper", daemon=True).start()
        self.note(f"{time.strftime('%F %T')} attempt {attempt}, rank {rank}, {socket.gethostname()}, {os.getpid()}\n")

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._notes.write(text)

    def close(self) -> None:
        """Gives the descriptors back, and waits until all is stored, for a while."""
        logger = logging.getLogger("trainer")
        logger.removeHandler(self._handler)
        logger.setLevel(self._level)
        for handler, level in self._levels:
            handler.setLevel(level)
        self._restore()
        self.note(END.decode())
        with contextlib.suppress(OSError):
            self._notes.close()
        self._ended.wait(END_WAIT_S)

    def _listen(self) -> None:
        """INFO goes to the notes, and from WARNING on everything where it went before."""
        logger = logging.getLogger("trainer")
        self._level = logger.level
        self._levels = [(handler, handler.level) for handler in logging.getLogger().handlers]
        for handler, level in self._levels:
            handler.setLevel(max(level, logging.WARNING))
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)

    def _lines_at_once(self) -> None:
        """What stands in a buffer when a process is killed is lost."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)

    def _watch(self) -> None:
        """A keeper that is gone must not leave the rank with pipes that nobody reads: writing to them would stop it."""
        with contextlib.suppress(OSError):
            os.read(self._alive, 1)
        os.close(self._alive)
        self._restore()
        for read in self._reads:
            os.close(read)
        self._ended.set()

    def _restore(self) -> None:
        with self._restored:
            if self._originals:
                _flush()
                for original, descriptor in zip(self._originals, (1, 2), strict=True):
                    os.dup2(original, descriptor)
                    os.close(original)
                self._originals = []


class _Notes(logging.Handler):
    """What is below WARNING, and would be shown nowhere."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note
        self.setFormatter(logging.Formatter(FORMAT))
        self.addFilter(lambda record: record.levelno < logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        self._note(self.format(record) + "\n")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
