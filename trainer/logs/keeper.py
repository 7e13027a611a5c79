"""``python -m trainer.logs.keeper``: a small process next to each rank that stores the rank's output.

It is a separate process, and an orphan, so that it outlives its rank: the last output before a crash, a kill by the
out-of-memory killer or a segmentation fault is in the pipe, and is stored. All output is also passed on to its original
destination; both copies are without credentials. A storage that does not answer delays neither the rank nor the output.
"""

from __future__ import annotations

import os
import selectors
import sys
import threading
import time
from collections.abc import Callable

END = b"\0"
"""Marks in the notes that the rank needs its keeper no longer. (Processes that it started may keep its pipes open.)"""
FLUSH_S = 3.0
LINE_S = 1.0
"""Seconds that an unfinished line waits for its rest before it is passed on."""
READ_BYTES = 64 * 1024
DEADLINE_S = 20.0
KEEP_ATTEMPTS = 20
"""Attempts whose logs stay."""


def main() -> None:
    url, attempt, rank, ranks, parent, out, err, notes = sys.argv[1], *map(int, sys.argv[2:])
    if os.fork():
        os._exit(0)  # a worker is killed with its children; an orphan is no longer one of them
    os.setsid()
    Keeper(url, attempt, rank, parent, ranks).run({out: 1, err: 2, notes: None})


class Keeper:
    """Stores one rank's output. ``run`` takes pipes, each with the descriptor that its bytes are passed on to; None for
    the notes, which are only stored. ``ranks``: how many there are; with many, each one stores less often."""

    def __init__(self, url: str, attempt: int, rank: int, parent: int, ranks: int = 1) -> None:
        from trainer.logs.parts import LogParts
        from trainer.storage import open_storage
        from trainer.storage.pace import write_interval_s

        self._storage = open_storage(url, deadline_s=DEADLINE_S)
        self._attempt, self._rank, self._parent = attempt, rank, parent
        self._parts = LogParts([])
        self._begun = self._swept = self._warned = False
        self._interval_s = write_interval_s(rank, ranks, FLUSH_S)
        self._first_s = FLUSH_S + (self._interval_s - FLUSH_S) * rank / ranks  # ranks that start together take turns
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._storer = threading.Thread(target=self._store_often, daemon=True)

    def run(self, pipes: dict[int, int | None]) -> None:
        from trainer.logs.parts import LogLines, Passed
        from trainer.redact import RedactedLines, redactor

        self._storer.start()
        lines = {pipe: LogLines(RedactedLines(redactor())) for pipe in pipes}
        passed = {pipe: Passed(_redaction(target)) for pipe, target in pipes.items() if target is not None}
        received = dict.fromkeys(passed, 0.0)
        with selectors.DefaultSelector() as selector:
            for pipe in pipes:
                os.set_blocking(pipe, False)
                selector.register(pipe, selectors.EVENT_READ)
            ended = False
            while selector.get_map():
                ready = selector.select(0.0 if ended else LINE_S)
                if ended and not ready:
                    break
                now = time.monotonic()
                for pipe, stream in passed.items():
                    if now - received[pipe] >= LINE_S:
                        _pass_on(pipes[pipe], stream.rest())
                for key, _ in ready:
                    data = _read(key.fd)
                    is_note = pipes[key.fd] is None
                    ended = ended or (is_note and (not data or END in data))
                    if not data:
                        selector.unregister(key.fd)
                    else:
                        if is_note:
                            data = data.replace(END, b"")
                        else:
                            received[key.fd] = now
                            _pass_on(pipes[key.fd], passed[key.fd].feed(data))
                        self.add(lines[key.fd].feed(data))
                ended = ended or not _is_alive(self._parent)
        for pipe, stream in passed.items():
            _pass_on(pipes[pipe], stream.rest())
        # Pass nothing on any more: a process that waits for the end of the rank's output must not wait for the storage.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        self.add(b"".join(stream.end() for stream in lines.values()))
        self._ending.set()
        self._storer.join(2 * DEADLINE_S)

    def add(self, data: bytes) -> None:
        if data:
            with self._lock:
                self._parts.add(data)

    def _store_often(self) -> None:
        wait_s = self._first_s
        while not self._ending.wait(wait_s):
            self.store()
            wait_s = self._interval_s
        self.store()

    def store(self) -> None:
        """Stores what has been added since the last call."""
        from trainer.errors import MusterError
        from trainer.run import layout

        try:
            self._begin()
            with self._lock:
                grown = self._parts.dirty()
            for offset, data in grown:
                self._storage.write(layout.log_part(self._attempt, self._rank, offset), data)
                with self._lock:
                    self._parts.stored(offset, len(data))
            with self._lock:
                dropped = self._parts.dropped()
            self._storage.delete([layout.log_part(self._attempt, self._rank, offset) for offset in dropped])
            with self._lock:
                self._parts.deleted(dropped)
            self._sweep()
        except (MusterError, OSError) as error:
            if not self._warned:
                os.write(2, f"the log of rank {self._rank} is not stored yet: {error}\n".encode())
            self._warned = True

    def _begin(self) -> None:
        """Continues, once, after the parts that an earlier keeper of this attempt has stored."""
        from trainer.logs.parts import stored_parts
        from trainer.run import layout

        if self._begun:
            return
        # The first part always stays. Where it is missing, no listing is needed, which grows with the ranks.
        if self._storage.info(layout.log_part(self._attempt, self._rank, 0)) is not None:
            ours = self._attempt, self._rank
            mine = [part for part in stored_parts(self._storage) if (part.attempt, part.rank) == ours]
            with self._lock:
                self._parts.move_behind([(part.offset, part.size) for part in mine])
        self._begun = True

    def _sweep(self) -> None:
        """Deletes, once, the parts that all ranks have stored in old attempts. Rank 0 does it for the others."""
        from trainer.logs.parts import stored_parts

        if self._swept or self._rank:
            return
        old = self._attempt - KEEP_ATTEMPTS
        self._storage.delete([part.key for part in stored_parts(self._storage) if part.attempt <= old])
        self._swept = True


def _redaction(target: int) -> Callable[[bytes], bytes]:
    """Returns the function that redacts bytes for this descriptor; for a terminal it also replaces control
    characters."""
    from trainer.redact import RedactedLines, redactor
    from trainer.terminal import neutralise_output

    redact = RedactedLines(redactor())
    if not os.isatty(target):
        return redact
    return lambda data: neutralise_output(redact(data).decode(errors="replace")).encode()


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, READ_BYTES)
    except BlockingIOError:
        return b""


def _pass_on(target: int | None, data: bytes) -> None:
    if target is None:
        return
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # the reader may be gone; the log is still stored
            return


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    main()
