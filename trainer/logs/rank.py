"""Sends a rank's output through its keeper while it trains: the output of Python, of libraries, of processes that the
rank starts, and of a crash."""

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
def rank_log(run: Storage, rank: int, ranks: int = 1) -> Iterator[None]:
    """Stores, during the block, standard output and error of this process under the run's ``logs/``, and the records
    that ``trainer`` logs from INFO on. A log that cannot be stored is a warning and stops nothing. ``ranks``: how many
    there are."""
    # The log belongs to the attempt that is claimed next: every rank is here before any of them can claim.
    try:
        redirected = Redirected(run, read_claims(run).attempt + 1, rank, ranks)
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
    """Leads descriptors 1 and 2 to a keeper, which stores and passes on the output. Notes are only stored."""

    def __init__(self, run: Storage, attempt: int, rank: int, ranks: int) -> None:
        self._restored = threading.Lock()
        out, err, notes, alive = pipes = tuple(os.pipe() for _ in range(4))
        arguments = [run.url, attempt, rank, ranks, os.getpid(), out[0], err[0], notes[0]]
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
        # Write each line at once: text in a buffer is lost when the process is killed.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)
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
        """Restores the descriptors, and waits up to `END_WAIT_S` until all is stored."""
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
        """Sends INFO records of ``trainer`` to the notes. Records from WARNING on keep their handlers."""
        logger = logging.getLogger("trainer")
        self._level = logger.level
        self._levels = [(handler, handler.level) for handler in logging.getLogger().handlers]
        for handler, level in self._levels:
            handler.setLevel(max(level, logging.WARNING))
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)

    def _watch(self) -> None:
        """Restores the descriptors once the keeper has ended: writing to a pipe without a reader would block the
        rank."""
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
    """Writes records below WARNING, which no other handler shows, to the notes."""

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
