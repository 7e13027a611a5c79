"""Metrics, events and ledgers as JSON Lines in object storage, where nothing can be appended to.

Rows collect in parts. A background thread rewrites the growing part, at most ``flush_s`` after a row was added, and
begins the next part when this one is full: readers never see a row twice, and hours of training make few objects.
Training never waits for the thread and never fails because of it: the next flush retries what could not be stored.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, TypeVar

from trainer.errors import StorageError
from trainer.parsing import JsonReader, Malformed
from trainer.redact import clean
from trainer.run import layout
from trainer.run.events import EndEvent, Event, FailureEvent
from trainer.run.metrics import Metrics, read_metrics_row
from trainer.storage import ObjectInfo, Storage, in_parallel

log = logging.getLogger(__name__)
T = TypeVar("T")
E = TypeVar("E", bound=Event)
FLUSH_S = 2.0
_ROLL_BYTES = 512 * 1024
_PARALLEL_READS = 8
_GLANCE_BYTES = 128 * 1024
_FAILURE_PARTS = 4
_EVENT_WAIT_S = 10.0
_CLOSE_S = 30.0
"""How long `close` waits for the thread after its last flush."""
_MOST_PATIENCE = 32  # times flush_s between attempts while the storage fails


@dataclass
class _Part:
    data: bytearray = field(default_factory=bytearray)
    rows: int = 0
    stored: int = 0


class JsonLinesWriter:
    """Rows of one writer under ``<prefix>-<part>.jsonl``. Another writer, or a later one with the same prefix, never
    overwrites them: numbering starts after the parts that are there. `add` may be called from any thread."""

    def __init__(self, storage: Storage, prefix: str, *, flush_s: float = FLUSH_S, roll_rows: int = 2000) -> None:
        self._storage = storage
        self._prefix = prefix
        self._flush_s = flush_s
        self._roll_rows = roll_rows
        self._changed = threading.Condition()
        self._parts = [_Part()]
        self._number: int | None = None
        self._added = self._stored = self._failures = 0
        self._urgent = self._closing = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row, which the thread stores later. Values that JSON lacks (nan, inf) become null."""
        text = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
        line = text.encode(errors="replace") + b"\n"  # a path or an error may hold bytes that are no text
        with self._changed:
            if self._closing:
                raise RuntimeError(f"a row came after {self._prefix} was closed: {row}")
            part = self._parts[-1]
            if part.rows >= self._roll_rows or (part.rows and len(part.data) + len(line) > _ROLL_BYTES):
                part = _Part()
                self._parts.append(part)
            part.data += line
            part.rows += 1
            self._added += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"rows {self._prefix}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, *, strict: bool = False, timeout_s: float | None = None) -> bool:
        """Stores every row so far. Returns whether that succeeded within ``timeout_s`` (None: the storage's own
        deadline); with ``strict``, raises instead of returning False."""
        with self._changed:
            target, failures = self._added, self._failures
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stored >= target or self._failures > failures, timeout_s)
            stored, error = self._stored >= target, self._error
        if strict and not stored:
            raise error or StorageError(f"{self._storage.url}/{self._prefix}: not stored within {timeout_s} s")
        return stored

    def close(self) -> None:
        """Stores the rest and ends the thread. When rows are left, raises the error of the last attempt."""
        with self._changed:
            self._closing = True
        try:
            self.flush(strict=True)
        finally:
            if self._thread is not None:
                self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        failed_in_a_row = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stored < self._added or self._closing)
                if self._stored >= self._added or (failed_in_a_row and self._closing):
                    return
                patience_s = self._flush_s * min(2**failed_in_a_row, _MOST_PATIENCE)
                self._changed.wait_for(lambda: self._urgent or self._closing, patience_s)
                self._urgent = False
                while self._parts[0].stored == self._parts[0].rows and len(self._parts) > 1:  # full and stored
                    self._parts.pop(0)
                    self._number = (self._number or 0) + 1
                part = self._parts[0]
                data, rows = bytes(part.data), part.rows
            failed_in_a_row = 0 if self._store(part, data, rows) else failed_in_a_row + 1

    def _store(self, part: _Part, data: bytes, rows: int) -> bool:
        """Writes a snapshot of one part and counts its rows. Only the thread calls it, so parts are stored in order."""
        try:
            if self._number is None:
                self._number = _next_number(self._storage, self._prefix)
            self._storage.write(f"{self._prefix}-{self._number:06d}.jsonl", data)
        except Exception as error:
            log.warning("rows of %s are not stored yet: %s", self._prefix, error)
            with self._changed:
                self._error = error
                self._failures += 1
                self._changed.notify_all()
            return False
        with self._changed:
            self._stored += rows - part.stored
            part.stored = rows
            self._urgent = self._urgent or len(self._parts) > 1  # rows of the next part have waited already
            self._changed.notify_all()
        return True


class Events:
    """Writes the events of a run: starts, failures, resizes, checkpoints, ends. ``writer`` names the process."""

    def __init__(self, storage: Storage, attempt: int, writer: str) -> None:
        self._attempt = attempt
        self._writer = writer
        self._lines = JsonLinesWriter(storage, layout.events_part(attempt, writer))

    def emit(self, event: Event, *, wait: bool = True) -> None:
        """Adds attempt, time and writer to an event, and stores it before it returns. When the storage is down, logs a
        warning, and the thread retries. Without ``wait``, returns at once and the thread stores the event soon."""
        complete = replace(event, attempt=self._attempt, time=time.time(), writer=self._writer)
        self._lines.add(clean(complete.to_row()))
        if wait and not self._lines.flush(timeout_s=_EVENT_WAIT_S):
            log.warning("the event %r of attempt %d is not stored yet", event.kind, self._attempt)

    def close(self) -> None:
        """Ends the writer. Errors are only logged: events must not decide how a run ends."""
        try:
            self._lines.close()
        except Exception:
            log.warning("events of attempt %d were not stored", self._attempt, exc_info=True)


def read_rows(storage: Storage, prefix: str) -> list[dict[str, Any]]:
    """Returns all rows of all parts below the folder ``prefix`` (``metrics``), as they are stored, by attempt, writer
    and order of writing."""
    return _read_parts(storage, prefix, _checked(prefix))


def read_events(storage: Storage, read: Callable[[Any], Event] = Event.from_row) -> list[Event]:
    """Returns the events of all attempts in the order of `read_rows`. ``read``: see `parse_lines`."""
    return _read_parts(storage, layout.EVENTS, read)


def read_metrics(storage: Storage) -> list[Metrics]:
    """Returns the metrics of all attempts in the order of `read_rows`."""
    return _read_parts(storage, layout.METRICS, read_metrics_row)


def events_backwards(storage: Storage) -> Iterator[Event]:
    """Yields the events of `read_events` from the last to the first. A part is read only when it is reached."""
    return _backwards(storage, layout.EVENTS, Event.from_row)


def metrics_backwards(storage: Storage) -> Iterator[Metrics]:
    """Yields the metrics of `read_metrics` from the last to the first, as `events_backwards`."""
    return _backwards(storage, layout.METRICS, read_metrics_row)


def rows_backwards(storage: Storage, prefix: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of `read_rows` from the last to the first, as `events_backwards`."""
    return _backwards(storage, prefix, _checked(prefix))


def _backwards(storage: Storage, prefix: str, read: Callable[[Any], T]) -> Iterator[T]:
    for info in reversed(_parts_below(storage, prefix)):
        yield from reversed(parse_lines(storage, info.key, storage.read(info.key), read))


def newest_rows(storage: Storage, prefix: str) -> list[dict[str, Any]]:
    """Returns the last rows of the newest part below the folder ``prefix``, in their order. Costs one listing and one
    read of at most `_GLANCE_BYTES`."""
    parts = _parts_below(storage, prefix)
    if not parts:
        return []
    key, size = parts[-1].key, parts[-1].size
    if size <= _GLANCE_BYTES:
        return parse_rows(storage, key, storage.read(key))
    tail = storage.read_range(key, size - _GLANCE_BYTES, size)
    return parse_rows(storage, key, tail.partition(b"\n")[2])


def newest_failure(storage: Storage, driver: int) -> FailureEvent | EndEvent | None:
    """Returns the event that explains why this driver's run failed last: the newest `FailureEvent`, or the `EndEvent`
    of a failure outside of an attempt. Reads only the newest parts that drivers write, to be fast."""
    parts = [info for info in _parts_below(storage, layout.EVENTS) if layout.driver_of_events(info.key) == driver]
    newest = sorted(parts, key=lambda info: (info.modified, info.key))[-_FAILURE_PARTS:]
    parsed = [parse_lines(storage, info.key, storage.read(info.key), Event.from_row) for info in newest]
    by_time = sorted((event for part in parsed for event in part), key=lambda event: event.time)
    causes = [event for event in by_time if isinstance(event, FailureEvent | EndEvent)]
    failure = next((event for event in reversed(causes) if isinstance(event, FailureEvent)), None)
    if failure is not None and not failure.retried:
        return failure
    return next((event for event in reversed(causes) if event is failure or event.cause), None)


def newest_event(storage: Storage, attempt: int, kind: type[E]) -> E | None:
    """Returns the newest event of this kind in ``attempt``, which has to be the newest one; None if there is none."""
    of_attempt = takewhile(lambda event: event.attempt == attempt, events_backwards(storage))
    return next((event for event in of_attempt if isinstance(event, kind)), None)


def plain(value: Any) -> Any:
    """Returns the value in the form that JSON accepts: non-finite floats become None, tuples become lists, numpy and
    torch scalars become Python's. Raises TypeError for anything else."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"a row holds {value!r} ({type(value).__name__}), which JSON has no form for")


def _parts_below(storage: Storage, prefix: str) -> list[ObjectInfo]:
    return [info for info in storage.list(prefix) if info.key.endswith(".jsonl")]


def _next_number(storage: Storage, prefix: str) -> int:
    """Returns the number after the highest stored part of this prefix."""
    # Most writers are new. Then no listing is needed, which grows with the number of writers.
    if storage.info(f"{prefix}-000000.jsonl") is None:
        return 0
    numbers = [0]
    for info in storage.list(prefix.rpartition("/")[0]):
        lead, _, tail = info.key.removesuffix(".jsonl").rpartition("-")
        if lead == prefix and tail.isdecimal():
            numbers.append(int(tail) + 1)
    return max(numbers)


def _read_parts(storage: Storage, prefix: str, read: Callable[[Any], T]) -> list[T]:
    keys = [info.key for info in _parts_below(storage, prefix)]
    parts = in_parallel(lambda key: parse_lines(storage, key, storage.read(key), read), keys, _PARALLEL_READS)
    return [row for part in parts for row in part]


def parse_rows(storage: Storage, key: str, lines: bytes) -> list[dict[str, Any]]:
    """Returns the rows of these complete lines of a part as they are stored."""
    return parse_lines(storage, key, lines, _checked(key))


def parse_lines(storage: Storage, key: str, lines: bytes, read: Callable[[Any], T]) -> list[T]:
    """Returns the result of ``read`` for each complete line of a part. Leaves out, with a warning, lines that are not
    JSON, and those for which ``read`` raises Malformed."""
    reader, rows, faults = JsonReader(), [], []
    for line in lines.split(b"\n"):
        if not line.strip():
            continue
        try:
            rows.append(read(reader.read(line)))
        except Malformed as fault:
            faults.append(str(fault))
    if faults:
        others = f", and {len(faults) - 1} more" if faults[1:] else ""
        log.warning("%s holds a line that is no row, which is left out: %s%s", storage.uri(key), faults[0], others)
    return rows


def _checked(key: str) -> Callable[[Any], dict[str, Any]]:
    """Returns a function that returns a valid row of this part or folder as it is, and raises Malformed for another."""
    typed = {layout.METRICS: read_metrics_row, layout.EVENTS: Event.from_row}.get(key.partition("/")[0])

    def check(row: Any) -> dict[str, Any]:
        if typed is not None:
            typed(row)
        if not isinstance(row, dict):
            raise Malformed("it is no object")
        return row

    return check
