"""The cause of an attempt's failure, as it is printed and stored with the run."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from trainer.errors import (
    Fenced,
    InputError,
    MusterError,
    NonFiniteLoss,
    RewardFailed,
    UsageError,
    WorkerFailed,
    where_of,
)
from trainer.redact import redact
from trainer.run.events import FailureEvent, HangEvent

FATAL = (UsageError, NonFiniteLoss, RewardFailed, Fenced)
COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset)|process ?group|all_?reduce|broadcast", re.IGNORECASE)
SHOWN_LINES = 12
OWN_FRAMES = 3
ROOT = Path(__file__).resolve().parents[2]
OWN = tuple(f"{ROOT / part}/" for part in ("launcher", "trainer", "cluster"))
_STEP = re.compile(r"step \d+(, )?")


class FailureKind(NamedTuple):
    """``fatal``: another attempt would fail in the same way; ``usage``: the user can fix it; ``own``: an error that
    muster raises, whose text contains the advice."""

    fatal: bool
    usage: bool
    own: bool

    @classmethod
    def of(cls, error: BaseException) -> FailureKind:
        return cls(isinstance(error, FATAL), isinstance(error, UsageError), isinstance(error, MusterError))


class WorkerError(Exception):
    """An exception of one rank, as it crosses from the worker to the driver. ``when`` is unix s; ``where`` is what the
    rank was doing (`trainer.errors.note_where`)."""

    def __init__(
        self,
        when: float,
        rank: int,
        host: str,
        error: str,
        trace: str,
        kind: FailureKind,
        where: str = "",
    ) -> None:
        super().__init__(when, rank, host, error, trace, kind, where)
        self.when, self.rank, self.host, self.error, self.trace = when, rank, host, error, trace
        self.kind, self.where = kind, where

    @property
    def fatal(self) -> bool:
        return self.kind.fatal

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.error}"

    @classmethod
    def of(cls, error: BaseException, when: float, rank: int, host: str, trace: str) -> WorkerError:
        where = where_of(error) or ""
        if isinstance(error, MusterError):  # its text needs no trace
            text, trace = str(error), ""
        else:
            text = f"{type(error).__name__}: {error}"
        if where and not _STEP.match(text):
            text = f"{where}: {text}"
        # Redact here, on the rank: the cluster's own logs contain the exception as it is raised.
        return cls(when, rank, host, redact(text), redact(trace), FailureKind.of(error), where)

    @property
    def cause(self) -> Failure:
        return Failure(str(self), self.rank, self.host, trace=self.trace, where=self.where, **self.kind._asdict())


@dataclass(frozen=True)
class Failure:
    """The first failure of an attempt. ``where``: what its rank was doing, if that is known; ``died``: the rank was
    killed and raised nothing."""

    message: str
    rank: int | None = None
    host: str | None = None
    fatal: bool = False
    usage: bool = False
    trace: str = ""
    died: bool = False
    where: str = ""
    own: bool = False

    @property
    def by_another(self) -> bool:
        """Returns whether another rank may be the cause: this one was killed, or its collectives broke."""
        return self.died or (not self.own and COLLECTIVE.search(self.message) is not None)

    def of_hang(self, hang: HangEvent) -> Failure:
        """Returns this failure with the cause and the rank of a hang: the rank that blocked the others."""
        found = replace(self, message=hang.cause or self.message)
        if not hang.ranks:
            return found
        first = hang.ranks[0]
        return replace(found, rank=first.rank, host=first.host, where=first.place)

    def as_error(self, advice: str = "") -> MusterError:
        details = [part for part in (_tail(self.trace), advice) if part]
        return InputError(self.message, *details) if self.usage else WorkerFailed(self.message, *details)

    def event(self, advice: str, *, retried: bool, driver: int | None = None, step: int | None = None) -> FailureEvent:
        return FailureEvent(
            cause=self.message,
            rank=self.rank,
            host=self.host,
            phase=_STEP.sub("", self.where, count=1) or None,
            trace=_tail(self.trace),
            advice=advice,
            step=step,
            retried=retried,
            driver=driver,
        )


def useful_stack(error: BaseException) -> str:
    """Returns the root cause's stack, cut to muster's last three frames and the frame that raised."""
    while error.__cause__ is not None:
        error = error.__cause__
    *before, last = traceback.extract_tb(error.__traceback__) or [None]
    own = [frame for frame in before if frame is not None and frame.filename.startswith(OWN)][-OWN_FRAMES:]
    return "".join(traceback.format_list([*own, last] if last else []))


def message_of(error: BaseException) -> str:
    """Returns what happened, without a stack or advice."""
    return error.cause if isinstance(error, MusterError) else f"{type(error).__name__}: {error}"


def _tail(trace: str) -> str:
    return "\n".join(trace.rstrip().splitlines()[-SHOWN_LINES:])
