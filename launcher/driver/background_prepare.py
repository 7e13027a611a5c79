"""Training may begin with the first window of the data, while the others are still being prepared.

Only where the number of steps is in the recipe: how many steps an epoch has is known when all windows are. What is
trained on is the same either way; what changes is when a row that cannot be used ends the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trainer.data import WINDOW_BYTES, PreparationSpec, PreparedDataset, epoch_order, open_begun, prepare_dataset
from trainer.errors import Interrupted
from trainer.storage import Storage

POLL_S = 0.5
CLOSE_S = 4.0


class EarlyStart:
    """Prepares training data in a thread, in the order of the first epoch. Close it before Ray goes."""

    def __init__(
        self,
        seed: int,
        map_windows: Callable[[Callable[[], bool]], Any],
        on_progress: Callable[..., None] | None,
        stopped: Callable[[], bool] = lambda: False,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        """``map_windows(stopped)`` gives the ``map`` to prepare with, which ends when ``stopped()``; ``stopped`` here
        ends the wait for the first window."""
        self._stopped = stopped
        self._seed, self._on_progress, self._window_bytes = seed, on_progress, window_bytes
        self._stop, self._error = threading.Event(), list[BaseException]()
        self._map = map_windows(self._stop.is_set)
        self._thread: threading.Thread | None = None

    def prepare(self, spec: PreparationSpec, tokenizer: Any, shared: Storage) -> PreparedDataset:
        """The data, once the window that training begins with is there. Raises what preparing raises by then."""
        self._thread = threading.Thread(target=self._work, args=(spec, tokenizer, shared), daemon=True)
        self._thread.start()
        while not self._ended(POLL_S) and not self._first_is_ready(spec, shared):
            if self._stopped():
                raise Interrupted("stopped while data was being prepared")
        self.check()
        found = open_begun(shared, spec.fingerprint)
        if found is not None and found.count == 1:  # complete, but for the record that says so
            self._ended(CLOSE_S)
            self.check()
            found = open_begun(shared, spec.fingerprint)
        assert found is not None, "preparing has begun"
        return found

    @property
    def going_on(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises what has ended the preparing, if anything has."""
        if self._error:
            raise self._error[0]

    def close(self) -> None:
        """Windows that are not begun stay unmade; the next run of this data makes them."""
        self._stop.set()
        self._ended(CLOSE_S)

    def __enter__(self) -> EarlyStart:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ended(self, timeout_s: float) -> bool:
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.going_on

    def _order(self, spec: PreparationSpec, count: int) -> list[int]:
        return epoch_order(spec.order_key, self._seed, 0, count)

    def _first_is_ready(self, spec: PreparationSpec, shared: Storage) -> bool:
        found = open_begun(shared, spec.fingerprint)
        return found is not None and found.ready(self._order(spec, found.count)[0])

    def _work(self, spec: PreparationSpec, tokenizer: Any, shared: Storage) -> None:
        try:
            prepare_dataset(
                spec,
                tokenizer,
                shared,
                map_windows=self._until_stopped,
                on_progress=self._on_progress,
                order=lambda count: self._order(spec, count),
                window_bytes=self._window_bytes,
            )
        except BaseException as error:  # whatever it is, it belongs to the driver
            if not self._stop.is_set():
                self._error.append(error)

    def _until_stopped(self, task: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        for result in self._map(task, jobs):
            yield result
            if self._stop.is_set():
                raise Interrupted("stopped while data was being prepared")
