"""A child process that answers calls: for libraries that may end, freeze or print over the process that uses them.

It ends with this process, however that ends, since the pipe between the two is closed then. Its output goes nowhere
unless ``MUSTER_DEBUG`` is 1.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from trainer.interruption import kill_tree

BEAT_S = 1.0
TRACKER = "ignore::UserWarning:multiprocessing.resource_tracker"
SILENCE_S = 120.0
"""A child that has sent nothing for so long is stopped or hangs, and is killed."""
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
"""Signals that a terminal or a scheduler sends to the whole group of processes: the parent handles them."""
DEBUG = "MUSTER_DEBUG"

_Call = tuple[int, str, tuple[Any, ...]]


class ChildEnded(Exception):
    """The child is gone; the text says how it ended."""


class Child:
    """A spawned process in which ``served()`` is called; the methods of the object that it returns can be called from
    here. Thread-safe. ``threads``: how many calls may run at a time; 0: one after the other, in the main thread.
    ``told`` is called with each text that the child gives to `tell`, in a thread of this class."""

    def __init__(
        self, served: Callable[[], Any], name: str, threads: int = 0, told: Callable[[str], None] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, served, threads), name=name)
        _silence_tracker()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)  # the child inherits the mask
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._calls: dict[int, Future[Any]] = {}
        self._ended: str | None = None
        self._told = told
        self._listener = threading.Thread(target=self._listen, name=f"{name}-replies", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        """Calls a method. The result or the exception of the method comes with the future; ChildEnded without one."""
        future: Future[Any] = Future()
        with self._lock:
            if self._ended is not None:
                future.set_exception(ChildEnded(self._ended))
                return future
            number = next(self._numbers)
            self._calls[number] = future
            with suppress(OSError):  # it has ended, which the listener finds
                self._pipe.send((number, method, arguments))
        return future

    def kill(self) -> None:
        """SIGKILL to the child and to all that it has started. Waits until it is gone."""
        kill_tree(self.pid)
        self._listener.join()

    def _listen(self) -> None:
        heard_at, silent = time.monotonic(), False
        while True:
            try:
                if self._pipe.poll(BEAT_S):
                    number, worked, value = self._pipe.recv()
                    heard_at = time.monotonic()
                    if number is not None:
                        future = self._calls.pop(number)
                        (future.set_result if worked else future.set_exception)(value)
                    elif value is not None and self._told is not None:
                        self._told(value)
                elif time.monotonic() - heard_at >= SILENCE_S and not silent:
                    silent = True
                    self._process.kill()
            except (EOFError, OSError):
                break
        self._process.join()
        ended = f"its process had not answered for {SILENCE_S:.0f} s and was killed" if silent else self._end()
        with self._lock:
            self._ended = ended
            calls = list(self._calls.values())
        for future in calls:
            future.set_exception(ChildEnded(ended))

    def _end(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"


def _silence_tracker() -> None:
    """Python's resource tracker removes what a killed process has left, such as the semaphores of its libraries. It is
    not to say so on the terminal."""
    given = os.environ.get("PYTHONWARNINGS", "")
    if TRACKER not in given:
        os.environ["PYTHONWARNINGS"] = f"{given},{TRACKER}".lstrip(",")


_tell: Callable[[str], None] = lambda text: None  # noqa: E731


def tell(text: str) -> None:
    """In the child: passes a text on to ``told`` of its `Child`."""
    _tell(text)


def _serve(pipe: Connection, served: Callable[[], Any], threads: int) -> None:
    """In the child: answers calls for ever."""
    if os.environ.get(DEBUG) != "1":
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    _leave_signals_to_the_parent()
    sending, calls = threading.Lock(), queue.SimpleQueue[_Call]()

    def send(*message: Any) -> None:
        with sending:
            pipe.send(message)

    def listen() -> None:
        try:
            while True:
                calls.put(pipe.recv())
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGKILL)  # the parent is gone

    def beat() -> None:
        while True:
            send(None, True, None)
            time.sleep(BEAT_S)

    def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            reply = number, True, getattr(target, method)(*arguments)
        except BaseException as error:
            reply = number, False, _portable(error)
        send(*reply)

    global _tell
    _tell = lambda text: send(None, True, text)  # noqa: E731
    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    target = served()
    pool = ThreadPoolExecutor(threads) if threads else None
    while True:
        call = calls.get()
        if pool:
            pool.submit(answer, *call)
        else:
            answer(*call)


def _leave_signals_to_the_parent() -> None:
    """Processes that are started from here ignore SIGINT, SIGHUP and SIGUSR1 too (srun passes a scheduler's warning on
    to all processes of its step); SIGTERM is for them to handle."""
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)


def _portable(error: BaseException) -> BaseException:
    """Returns the error, or one that says the same if it cannot be pickled and read again."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))  # as the pipe does
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
