"""All interleavings of processes that run the real protocol code over one store.

A process is a plain function over a `Storage`. It is deterministic but for what the store answers, so its state is the
history of those answers: to find its next operation, it is run from its start with the history played back, and
stopped (`Pause`) at the first operation that the history does not answer. Nothing is remembered in threads, and each
state is visited once: a state is the store's content, every process's history, and how many replies may still be lost.

Crashes need no transition of their own. What a reader finds is checked in *every* state, and a process that is never
scheduled again has crashed there; one that is scheduled late is a zombie.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from trainer.checkpoint import (
    CommitRecord,
    OnSkip,
    Retention,
    claim_attempt,
    claim_driver,
    commit,
    list_commits,
    newest_complete,
    put_checkpoint,
    read_claims,
)
from trainer.errors import Fenced, StorageError
from trainer.storage import ObjectInfo, Retry, Storage
from trainer.storage.backend import Entries, Listing, Moved, Transient

ROOT = "model://run"
WHEN = "2026-01-01T00:00:00+00:00"
CHANGING = ("create", "write", "delete")
Key = tuple[int, int]
Operation = tuple[str, str, bytes]
Store = Mapping[str, bytes]


class Violation(AssertionError):
    """A state that the protocol promises not to reach."""


class Pause(BaseException):
    """The history ends here; ``operation`` is what the process asks next. No handler of the protocol may stop it."""

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation)
        self.operation = operation


class Played:
    """A backend that answers from a history."""

    def __init__(self, history: Sequence[Any]) -> None:
        self._answers = iter(history)

    def _ask(self, verb: str, path: str, data: bytes = b"") -> Any:
        answer = next(self._answers, None)
        if answer is None:
            raise Pause((verb, path, data))
        if isinstance(answer[0], type):
            raise answer[0](path)
        return answer[0]

    def read(self, path: str) -> bytes:
        data: bytes = self._ask("read", path)
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return self.read(path)[start:stop]

    def write(self, path: str, data: bytes) -> None:
        self._ask("write", path, data)

    def create(self, path: str, data: bytes) -> None:
        self._ask("create", path, data)

    def upload(self, path: str, source: str, moved: Moved) -> None:
        with open(source, "rb") as file:
            self.write(path, file.read())

    def list(self, path: str, moved: Moved) -> Listing:
        return [ObjectInfo(key, size, "", 0.0) for key, size in self._ask("list", path)]

    def entries(self, path: str) -> Entries:
        found = self.list(path, lambda: None)
        folders = {info.key.split("/")[0] for info in found if "/" in info.key}
        return Entries([info for info in found if "/" not in info.key], sorted(folders))

    def info(self, path: str) -> ObjectInfo | None:
        data = self._ask("info", path)
        return None if data is None else ObjectInfo(path, len(data), "", 0.0)

    def delete(self, path: str) -> None:
        self._ask("delete", path)

    def abort_uploads(self, path: str, stale: Callable[[str], bool]) -> int:
        return 0

    def remove_empty_folders(self, path: str) -> None: ...

    def reconnect(self) -> None: ...


def answer(store: Store, operation: Operation, *, exclusive: bool = True) -> tuple[Store, tuple[Any, ...]]:
    """The store after an operation, and what it answers: a value or an exception's class, in a tuple."""
    verb, path, data = operation
    if verb == "read":
        return store, (store.get(path, FileNotFoundError),)
    if verb == "info":
        return store, (store.get(path),)
    if verb == "list":
        lead = path + "/"
        return store, (tuple((p[len(lead) :], len(d)) for p, d in sorted(store.items()) if p.startswith(lead)),)
    if verb == "delete":
        return {p: d for p, d in store.items() if p != path}, (True,)
    if verb == "create" and exclusive and path in store:
        return store, (FileExistsError,)
    return {**store, path: data}, (True,)


@contextmanager
def one_thread() -> Iterator[None]:
    """A process asks for one thing after the other."""

    def in_turn(task: Callable[[Any], Any], items: Iterable[Any], threads: int) -> list[Any]:
        return list(map(task, items))

    with ExitStack() as patched:
        for module in ("storage.store", "checkpoint.protocol", "checkpoint.blobs", "checkpoint.retention"):
            patched.enter_context(mock.patch(f"trainer.{module}.in_parallel", in_turn))
        yield


def storage_over(backend: Any, kind: type[Storage] = Storage) -> Storage:
    """Its calls are not limited in time: a played answer comes at once, and a thread for each would cost minutes."""
    alone: Any = lambda attempt, silence_s: attempt(lambda: None)  # noqa: E731
    slept = [0.0]
    return kind(ROOT, backend, Retry(30.0, clock=lambda: sum(slept), sleep=slept.append, limited=alone))


@dataclass
class Log:
    """What one process has said to the outside: the commits whose return it saw, and the attempts as which it passed
    over a commit that was not whole."""

    acknowledged: list[Key] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)


Process = Callable[[Storage, Log], None]


@dataclass(frozen=True)
class Worker:
    """What one attempt does, in the order of trainer/worker/attempt.py: claim, restore on every rank, then per
    checkpoint upload, commit, retain. The flags leave a step of the protocol out."""

    driver: int | None = None
    commits: int = 2
    keep_last: int = 1
    ranks: int = 1
    claim_first: bool = True

    def __call__(self, storage: Storage, log: Log) -> None:
        driver = self.driver or claim_driver(storage, {})
        if self.claim_first:
            attempt = claim_attempt(storage, driver, {})
            base = self._restore(storage, lambda *_: log.skipped.append(attempt))
        else:
            base = self._restore(storage, lambda *_: None)
            attempt = claim_attempt(storage, driver, {})
        step, lineage = (base.step, [*base.state["lineage"], [base.attempt, base.step]]) if base else (0, [])
        retention = Retention(storage, attempt, keep_last=self.keep_last)
        for _ in range(self.commits):
            step += 1
            name, files = put_checkpoint(storage, {"weights": b"%d" % step}, attempt=attempt, step=step)
            record = CommitRecord(step, attempt, driver, name, name, files, {"lineage": lineage}, WHEN)
            commit(storage, record)
            log.acknowledged.append((attempt, step))
            lineage = [*lineage, [attempt, step]]
            retention.apply(record)

    def _restore(self, storage: Storage, on_skip: OnSkip) -> CommitRecord | None:
        """Rank 0 chooses; every other rank reads the same files before anybody trains."""
        found = newest_complete(storage, on_skip=on_skip)
        for _ in range(1, self.ranks if found else 1):
            assert found is not None
            for name, data in found[1].items():
                if storage.read(found[0].file_key(name)) != data:
                    raise Violation(f"rank 1 reads other bytes of {name} than rank 0")
        return found[0] if found else None


def read_from_outside(storage: Storage, log: Log) -> None:
    """Somebody who only looks (`generate`, `merge`), while the store has a commit that is acknowledged."""
    if newest_complete(storage, on_skip=lambda *_: None) is None:
        raise Violation("a reader found nothing, although there always was something")


@dataclass(frozen=True)
class Next:
    """Where a process stands: what it asks, or None when it has ended, and what it has said."""

    operation: Operation | None
    acknowledged: tuple[Key, ...]
    skipped: tuple[int, ...]


class Model:
    """Explores; `explore` returns the number of states, or raises Violation with the way to it."""

    def __init__(
        self,
        processes: Sequence[Process],
        *,
        lost_replies: int = 0,
        exclusive: bool = True,
        kind: type[Storage] = Storage,
        store: Store | None = None,
        held_at: Sequence[str] = (),
    ) -> None:
        """``held_at``: the first processes have run, one after the other, until they ask for this (``create commits``)
        when the exploration begins; so three of them are few enough states."""
        self.processes, self.lost_replies, self.exclusive, self.kind = processes, lost_replies, exclusive, kind
        self.start, self.held_at = dict(store or {}), held_at
        self._histories: dict[tuple[int, Any], int] = {}
        self._answers: list[tuple[int, Any]] = [(-1, None)]
        self._next: dict[tuple[int, int], Next] = {}
        self._checked: set[tuple[Any, ...]] = set()

    def explore(self) -> int:
        with one_thread():
            first, start = self._first()
            came: dict[Any, Any] = {first: None}
            todo = [(first, start)]
            while todo:
                state, store = todo.pop()
                try:
                    self._check(state, store)
                    following = list(self._steps(state, store))
                except Violation as violation:
                    raise Violation(f"{violation}; the way to it:\n" + "\n".join(self._way(came, state))) from None
                for then, changed in following:
                    if then not in came:
                        came[then] = state
                        todo.append((then, changed))
            return len(came)

    def _first(self) -> tuple[Any, Store]:
        store: Store = self.start
        histories: tuple[int, ...] = (0,) * len(self.processes)
        for process, until in enumerate(self.held_at):
            while (operation := self._at(process, histories[process]).operation) is not None:
                if f"{operation[0]} {operation[1].removeprefix(ROOT + '/')}".startswith(until):
                    break
                store, said = answer(store, operation, exclusive=self.exclusive)
                histories = self._moved(histories, process, said)
        return (frozenset(store.items()), histories, self.lost_replies), store

    def _way(self, came: Mapping[Any, Any], state: Any) -> list[str]:
        """What was asked on the way to ``state``, one line per operation."""
        lines = []
        while (before := came[state]) is not None:
            (process,) = (p for p, (a, b) in enumerate(zip(before[1], state[1], strict=True)) if a != b)
            verb, path, _ = self._at(process, before[1][process]).operation or ("", "", b"")
            lost = ", reply lost" if before[2] != state[2] else ""
            lines.append(f"  process {process}: {verb} {path.removeprefix(ROOT + '/')}{lost}")
            state = before
        return lines[::-1]

    def _steps(self, state: Any, store: Store) -> Iterator[tuple[Any, Store]]:
        content, histories, losses = state
        for process, history in enumerate(histories):
            operation = self._at(process, history).operation
            if operation is None:
                continue
            changed, said = answer(store, operation, exclusive=self.exclusive)
            frozen = content if changed is store else frozenset(changed.items())
            yield (frozen, self._moved(histories, process, said), losses), changed
            if losses and operation[0] in CHANGING:
                yield (frozen, self._moved(histories, process, (Transient,)), losses - 1), changed

    def _moved(self, histories: tuple[int, ...], process: int, said: Any) -> tuple[int, ...]:
        key = (histories[process], said)
        if key not in self._histories:
            self._histories[key] = len(self._answers)
            self._answers.append(key)
        return (*histories[:process], self._histories[key], *histories[process + 1 :])

    def _at(self, process: int, history: int) -> Next:
        key = (process, history)
        if key not in self._next:
            self._next[key] = self._run(process, self._answers_of(history))
        return self._next[key]

    def _answers_of(self, history: int) -> list[Any]:
        said = []
        while history:
            history, last = self._answers[history]
            said.append(last)
        return said[::-1]

    def _run(self, process: int, history: Sequence[Any]) -> Next:
        log, count = Log(), itertools.count()

        def unique() -> SimpleNamespace:
            return SimpleNamespace(hex=f"{process:06x}{next(count):06x}{0:020x}")

        with mock.patch("uuid.uuid4", unique):
            try:
                self.processes[process](storage_over(Played(history), self.kind), log)
            except Pause as pause:
                return Next(pause.operation, tuple(log.acknowledged), tuple(log.skipped))
            except (Fenced, StorageError, FileNotFoundError):
                pass
        return Next(None, tuple(log.acknowledged), tuple(log.skipped))

    def _check(self, state: Any, store: Store) -> None:
        """In every state: the newest record and every acknowledged one point at whole files, whoever reads now goes on
        from every commit that anybody was told of, and only a zombie ever meets a commit that is not whole."""
        content, histories, _ = state
        stands = [self._at(process, history) for process, history in enumerate(histories)]
        told = tuple(key for stand in stands for key in stand.acknowledged)
        skipped = max((attempt for stand in stands for attempt in stand.skipped), default=0)
        if (content, told, skipped) in self._checked:
            return
        self._checked.add((content, told, skipped))
        storage = storage_over(_Snapshot(store))
        if skipped and skipped >= read_claims(storage).attempt:
            raise Violation(f"attempt {skipped}, the newest, met a checkpoint that is not whole")
        records = list_commits(storage)
        for i, record in enumerate(records):
            if (i == 0 or (record.attempt, record.step) in told) and not _is_whole(storage, record, store):
                raise Violation(f"the record of {record.attempt, record.step} points at files that are not whole")
        known = {(records[0].attempt, records[0].step), *map(tuple, records[0].state["lineage"])} if records else set()
        if len(told) != len(set(told)) or not known.issuperset(told):
            raise Violation(f"acknowledged were {told}, but the newest checkpoint goes back to {sorted(known)}")


def _is_whole(storage: Storage, record: CommitRecord, store: Store) -> bool:
    files = {name: store.get(storage.uri(record.file_key(name)), b"") for name in record.files}
    return all(hashlib.sha256(data).hexdigest() == record.files[name]["sha256"] for name, data in files.items())


class _Snapshot(Played):
    """The store as one reader finds it while nobody else moves."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def _ask(self, verb: str, path: str, data: bytes = b"") -> Any:
        said = answer(self._store, (verb, path, data))[1][0]
        if isinstance(said, type):
            raise said(path)
        return said
