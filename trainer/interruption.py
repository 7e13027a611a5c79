"""Handles signals: they end a command with exit code 3 and one sentence, at every moment and within a bounded time.

A signal is received in two places. Python's handler runs in the main thread between two of its instructions, and
raises, so that open resources are closed while the stack unwinds. A thread reads the wake-up descriptor, into which the
signal's number is written at once, whatever the main thread is doing. When the main thread does not end in time,
because it is inside C code or waits for something, the thread ends the process, its child processes and its temporary
folder.

    begin()                  the first line of a program: until `command()`, a signal ends the process at once
    command(promise)         from here on a signal raises KeyboardInterrupt (SIGINT) or Terminated (the others)
    asking(ask)              within the block the first signal calls ``ask``, and the second one raises
    settle(code)             the exit code is decided: a signal cannot change it any more

Standard library only: it is imported before anything else.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LEAVE_S = 15.0
"""How long unwinding may take before the thread ends the process."""
TWICE_S = {signal.SIGHUP: 0.9}
SAME_S = 0.4
"""Signals this close to the one before count as that one: a closed terminal sends SIGHUP from the shell and from the
kernel, and a Ctrl-C that a parent passes on comes twice."""
ASKED_S = 60.0
"""How long the main thread may be inside one call while it requests workers to commit."""
GONE_S = 60.0
"""How long a thread sleeps because the other one is ending the process."""
CODE = 3
STARTS = "nothing is lost, the same command starts it"
RESUMES = "the same command resumes from the newest checkpoint"
"""Promises of a command that trains: before its run has a checkpoint, and from then on."""
HANDLED = 0
"""Written by the handler into the same pipe, after the number that it has handled."""


class Terminated(SystemExit):
    """SIGTERM, SIGHUP or SIGUSR1 in the main thread. A SystemExit, because libraries do not catch it."""

    def __init__(self, name: str) -> None:
        super().__init__(CODE)
        self.name = name


class Interruption:
    """The signal handling of this process. There is one instance, `current`."""

    def __init__(self) -> None:
        self.heard: str | None = None
        """The first signal's name."""
        self.asked = False
        self.promise = "nothing was begun"
        self._early, self._leaving, self._reported = True, False, False
        self._ask: Callable[[str], None] | None = None
        self._settled: int | None = None
        self._last = self._deadline = self._unhandled = float("inf")
        self._forcing = threading.Lock()
        self._undo: list[Callable[[], None]] = []
        self._begun = False
        self._keyboard = False
        self._pipe, self._arrived = -1, "a signal"
        self._fork = threading.local()

    def begin(self) -> None:
        """Installs the handlers; called in the main thread. SIGHUP stays ignored where it was (nohup)."""
        if self._begun:
            return
        self._begun = True
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        # Block signals in the thread: a signal that the kernel delivers to it would not wake the main thread.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._in_child)
        atexit.register(self._ignore)  # the first to be registered is called last

    def command(self, promise: str) -> None:
        """Makes signals raise from now on. ``promise``: the part of the sentence that explains how to continue."""
        self.promise, self._early = promise, False

    @contextmanager
    def asking(self, ask: Callable[[str], None]) -> Iterator[None]:
        """Makes the first signal within the block call ``ask(name)`` in the main thread. If one was received, the time
        after the block is bounded."""
        self.ask_first(ask)
        try:
            yield
        finally:
            self._ask = None
            if self.heard is not None:
                self._leave_by(time.monotonic() + LEAVE_S)

    def ask_first(self, ask: Callable[[str], None]) -> None:
        """Makes the first signal from now on call ``ask(name)`` in the main thread; the second one raises."""
        self._ask = ask

    def on_force(self, undo: Callable[[], None]) -> None:
        """Calls ``undo`` if the process is ended without unwinding."""
        self._undo.append(undo)

    @contextmanager
    def keyboard(self) -> Iterator[None]:
        """Makes Ctrl-C raise KeyboardInterrupt within the block without ending the command, for interactive input."""
        self._keyboard = True
        try:
            yield
        finally:
            self._keyboard = False

    def settle(self, code: int) -> None:
        """Fixes the exit code; only the interpreter's own end is left."""
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):
                stream.flush()
        self._settled = code

    def sentence(self) -> str:
        return f"{self.heard}: ended before it was done; {self.promise}"

    def leave(self, text: str | None = None) -> NoReturn:
        """Ends the process with exit code 3 after the stack was unwound; kills the remaining children."""
        # Not by the interpreter's own end, in which libraries that were interrupted may crash or wait for ever.
        self._report(text or self.sentence())
        self._end()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._forcing.locked():
            time.sleep(GONE_S)
        now = time.monotonic()
        with suppress(OSError):
            os.write(self._pipe, bytes([HANDLED]))
        if number == signal.SIGINT and self._keyboard:
            raise KeyboardInterrupt
        if self._settled is not None:
            os._exit(self._settled)
        first, close = self.heard is None, now - self._last < TWICE_S.get(signal.Signals(number), SAME_S)
        self._last = now
        if not first and close:
            return
        name = signal.Signals(number).name
        self.heard = self.heard or name
        if self._early or (self._leaving and not first):
            self._force()
        if self._ask is not None and first:
            self.asked = True
            self._ask(name)
            return
        leaving = self._leaving
        self._leave_by(now + LEAVE_S)
        if leaving:
            return  # unwinding already, for another reason
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(name)

    def unwinding(self) -> None:
        """Marks the rest as clean-up: a signal raises no exception in it any more, and only bounds its time."""
        self._leaving = True

    def _leave_by(self, deadline: float) -> None:
        self._leaving = True
        self._deadline = min(self._deadline, deadline)

    def _watch(self, read: int) -> None:
        import select

        arrived = 0.0
        while True:
            due = min(self._deadline, self._unhandled + (ASKED_S if self._ask else LEAVE_S))
            left = None if due == float("inf") else max(0.0, due - time.monotonic())
            if not select.select([read], [], [], min(left, 1.0) if left is not None else 1.0)[0]:
                if left == 0.0:
                    self._force()
                continue
            for number in os.read(read, 64):
                now = time.monotonic()
                if number == HANDLED:
                    self._unhandled = float("inf")
                if number not in SIGNALS or now - arrived < TWICE_S.get(signal.Signals(number), SAME_S):
                    continue
                arrived = now
                # The main thread has not handled it yet, and perhaps never will.
                if self._unhandled != float("inf"):
                    self._force()
                self._unhandled, self._arrived = now, signal.Signals(number).name

    def _force(self) -> NoReturn:
        """Ends the process without unwinding."""
        if not self._forcing.acquire(blocking=False):
            time.sleep(GONE_S)
        if self._settled is not None:
            os._exit(self._settled)
        self.heard = self.heard or self._arrived
        self._report(self.sentence())
        self._end()

    def _report(self, text: str) -> None:
        if self._reported:
            return
        self._reported = True
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        shown = "\x1b[?25h" if os.isatty(2) else ""  # a live display hides the cursor
        with suppress(OSError):
            os.write(2, f"{shown}muster: interrupted: {text}\n".encode())

    def _end(self, code: int = CODE) -> NoReturn:
        self._deadline = self._unhandled = float("inf")
        with suppress(Exception):
            kill_tree()
        for undo in reversed(self._undo):
            with suppress(Exception):
                undo()
        os._exit(code)

    def _ignore(self) -> None:
        # The interpreter's end restores the former handlers, except those of ignored signals.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _before_fork(self) -> None:
        self._fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._fork.mask)

    def _in_child(self) -> None:
        # A forked process receives its own signals; they must not be reported to this process.
        if self._begun:
            signal.set_wakeup_fd(-1)
            self._begun = False
            for number in SIGNALS:
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self._after_fork()


def kill_tree(pid: int | None = None) -> None:
    """Sends SIGKILL to a process and to every descendant of it; None: to the descendants of this process. They are
    stopped before, parents first: a process that one of them starts meanwhile would be in no list."""
    import psutil

    stopped = set[psutil.Process]()
    with suppress(psutil.NoSuchProcess):  # it has ended
        root = psutil.Process(pid)
        found = {root} if pid is not None else set(root.children(recursive=True))
        while found:
            for process in found:
                with suppress(psutil.Error):
                    process.suspend()
            stopped |= found
            found = set(root.children(recursive=True)) - stopped
    for process in stopped:
        with suppress(psutil.Error):
            process.kill()


current = Interruption()
