"""Prepared data whose windows are still being made: training can start before the last window exists.

The training order does not depend on when a window is made: the number of windows and their order are known from the
start, and a window's plan needs only its own index. Reading a window that does not exist yet waits for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypedDict

from trainer.data.prepare.prepared import PreparedDataset, open_prepared
from trainer.data.prepare.window import WindowEntry, entry_of, index_key
from trainer.data.spec import PreparationSpec
from trainer.errors import CorruptObject, InputError
from trainer.parsing import Malformed
from trainer.records import Count, read_record
from trainer.storage import Storage

log = logging.getLogger(__name__)

BEGUN = "begun.json"
POLL_S = 1.0
LOG_S = 30.0
PATIENCE_S = 900.0
"""Without a new window for this long, the preparing process is considered dead."""


class PartialDataset(PreparedDataset):
    """Prepared data that may be incomplete. ``count`` is the final number of windows; ``windows`` is empty, and so
    totals are unknown.

    `index` waits for a window that does not exist yet. It raises InputError when no window was added for PATIENCE_S.
    """

    def __init__(
        self,
        storage: Storage,
        spec: PreparationSpec,
        count: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(storage, spec, [])
        self._count, self._clock, self._sleep = count, clock, sleep
        self._entries: dict[int, WindowEntry] = {}

    @property
    def count(self) -> int:
        return self._count

    def ready(self, window: int) -> bool:
        return self.storage.info(index_key(window)) is not None

    def _entry(self, window: int) -> WindowEntry:
        if window not in self._entries:
            self._await(window)
            self._entries[window] = entry_of(self.storage, window, self.storage.read(index_key(window)))
        return self._entries[window]

    def _await(self, window: int) -> None:
        there, since, log_at = -1, self._clock(), self._clock() + LOG_S
        while not self.ready(window):
            now, found = self._clock(), sum(o.key.endswith(".index") for o in self.storage.list())
            if found != there:
                there, since = found, now
            if now - since > PATIENCE_S:
                raise InputError(
                    f"the data is not prepared: {there} of {self.count} windows are in {self.storage.url}, and none "
                    f"was added for {PATIENCE_S / 60:.0f} minutes; start the run again, and it resumes from its last "
                    "checkpoint"
                )
            if now > log_at:
                log_at = now + LOG_S
                log.warning("waiting for data: %d of %d windows are prepared", there, self.count)
            self._sleep(POLL_S)


class _Beginning(TypedDict):
    spec: Any
    windows: Count


def open_begun(shared: Storage, fingerprint: str) -> PreparedDataset | None:
    """Opens prepared data of this fingerprint, complete or not. Returns None if no process has started to prepare
    them."""
    complete = open_prepared(shared, fingerprint)
    if complete is not None:
        return complete
    folder = shared.child(fingerprint)
    try:
        body = folder.read_json(BEGUN)
    except FileNotFoundError:
        return None
    try:
        begun = read_record(_Beginning, body)
        spec = PreparationSpec.from_json(begun["spec"])
        if spec.fingerprint != fingerprint:
            raise Malformed("it belongs to other data than its folder")
        return PartialDataset(folder, spec, begun["windows"])
    except Malformed as error:
        raise CorruptObject(f"{folder.url}/{BEGUN} cannot be understood ({error}); delete {folder.url}") from error
