"""``python -m trainer.logs.keeper``: a small process beside each rank that stores what the rank prints.

It is a process of its own, and an orphan, so that it outlives its rank: what was printed last before a crash, a kill by
the out-of-memory killer or a segmentation fault is in the pipe, and is stored. Everything is passed on to where it
would have gone without it, too, in both cases without credentials. A storage that does not answer holds up neither.
"""

from __future__ import annotations

import os
import selectors
import sys
import threading
import time
from collections.abc import Callable

END = b"\0"
"""Among the notes: the rank needs its keeper no more. (Its pipes may stay open in processes that it has started.)"""
FLUSH_S = 3.0
LINE_S = 1.0
"""Seconds that the begin of a line waits for its rest before it is passed on."""
READ_BYTES = 64 * 1024
DEADLINE_S = 20.0
KEEP_ATTEMPTS = 20
"""Attempts whose logs stay."""


def main() -> None:
    url, attempt, rank, parent, out, err, notes = sys.argv[1], *map(int, sys.argv[2:])
    if os.fork():
        os._exit(0)  # whoever ends a worker ends its children with it: an orphan is nobody's child
    os.setsid()
    Keeper(url, attempt, rank, parent).run({out: 1, err: 2, notes: None})


class Keeper:
    """``run`` takes pipes, each with the descriptor that its bytes are passed on to."""

    def __init__(self, url: str, attempt: int, rank: int, parent: int) -> None:
        from trainer.logs.parts import LogParts
        from trainer.storage import open_storage

        self._storage = open_storage(url, deadline_s=DEADLINE_S)
        self._attempt, self._rank, self._parent = attempt, rank, parent
        self._parts = LogParts([])
        self._begun = self._said = False
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._storer = threading.Thread(target=self._store_often, daemon=True)

    def run(self, pipes: dict[int, int | None]) -> None:
        from trainer.logs.parts import LogLines, Passed
        from trainer.redact import RedactedLines, redactor

        self._storer.start()
        lines = {pipe: LogLines(RedactedLines(redactor())) for pipe in pipes}
        passed = {pipe: Passed(_redaction(target)) for pipe, target in pipes.items() if target is not None}
        heard = dict.fromkeys(passed, 0.0)
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
                    if now - heard[pipe] >= LINE_S:
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
                            heard[key.fd] = now
                            _pass_on(pipes[key.fd], passed[key.fd].feed(data))
                        self._add(lines[key.fd].feed(data))
                ended = ended or not _is_alive(self._parent)
        for pipe, stream in passed.items():
            _pass_on(pipes[pipe], stream.rest())
        _let_go()
        self._add(b"".join(stream.end() for stream in lines.values()))
        self._ending.set()
        self._storer.join(2 * DEADLINE_S)

    def _add(self, data: bytes) -> None:
        if data:
            with self._lock:
                self._parts.add(data)

    def _store_often(self) -> None:
        while not self._ending.wait(FLUSH_S):
            self._store()
        self._store()

    def _store(self) -> None:
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
        except (MusterError, OSError) as error:
            if not self._said:
                os.write(2, f"the log of rank {self._rank} is not stored yet: {error}\n".encode())
            self._said = True

    def _begin(self) -> None:
        """Once: goes on after what an earlier try of this attempt has left, and clears what is too old."""
        from trainer.logs.parts import stored_parts

        if self._begun:
            return
        mine = [part for part in stored_parts(self._storage) if part.rank == self._rank]
        self._storage.delete([part.key for part in mine if part.attempt <= self._attempt - KEEP_ATTEMPTS])
        with self._lock:
            self._parts.move_behind([(part.offset, part.size) for part in mine if part.attempt == self._attempt])
        self._begun = True


def _redaction(target: int) -> Callable[[bytes], bytes]:
    """Returns what redacts the bytes for this descriptor; a terminal is also spared control characters."""
    from trainer.redact import RedactedLines, redactor
    from trainer.terminal import neutralise_output

    redact = RedactedLines(redactor())
    if not os.isatty(target):
        return redact
    return lambda data: neutralise_output(redact(data).decode(errors="replace")).encode()


def _let_go() -> None:
    """Nothing more is passed on: whoever waits for the end of the rank's output shall not wait for its storage."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, READ_BYTES)
    except BlockingIOError:
        return b""


def _pass_on(target: int | None, data: bytes) -> None:
    """Whoever read it may be gone; that is no reason to stop."""
    if target is None:
        return
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
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
