"""Requests to one server that are tried again while it cannot be reached or fails."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trainer.errors import EngineFailed, InputError
from trainer.inference.exchange import Address, Answer, NotAnswered, Upload, exchange

_AGAIN = (408, 425, 429)


@dataclass(frozen=True)
class Bounds:
    """Limits of every request. ``connect_s``: until there is a connection; ``answer_s``: until the answer is complete,
    which for a text includes its wait among the others; ``patience_s``: no further attempt begins later than this after
    the first one; ``first_wait_s``, ``longest_wait_s``: waits between attempts, which double and vary by half;
    ``files_s``: how long a server may refuse an adapter because it does not see its files yet (network file systems
    show them late); ``loads``: how often one text's adapter is loaded again."""

    connect_s: float = 10.0
    answer_s: float = 600.0
    patience_s: float = 300.0
    first_wait_s: float = 0.5
    longest_wait_s: float = 15.0
    files_s: float = 30.0
    loads: int = 3


class PatientRequests:
    """Thread-safe. ``watch`` is called after each failed attempt; it returns True if the server was started again, so
    that patience begins again, and raises if there is no hope."""

    def __init__(
        self,
        address: str,
        bounds: Bounds,
        api_key: str | None,
        *,
        watch: Callable[[], bool] = lambda: False,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address, self._bounds = Address.of(address), bounds
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._watch, self._sleep, self._clock = watch, sleep, clock

    def ask(
        self, what: str, method: str, path: str, body: Any = None, *, upload: Upload | None = None, final: int = 0
    ) -> Answer:
        """Returns the server's answer, which may be a refusal (4xx). Tries again while the server cannot be reached or
        fails (5xx, but for ``final``); raises EngineFailed when it takes too long."""
        started = self._clock()
        for attempt, wait_s in enumerate(self.waits(), 1):
            try:
                answer = self.once(method, path, body, upload=upload)
            except NotAnswered as error:
                came = str(error)
            else:
                if answer.status == final or (answer.status < 500 and answer.status not in _AGAIN):
                    return answer
                came = f"{answer.status}: {answer.words}"
            if self._watch():
                started = self._clock()
                continue
            elapsed_s = self._clock() - started
            if elapsed_s + wait_s > self._bounds.patience_s:
                raise EngineFailed(
                    f"the inference server {self.address} did not {what}: {attempt} attempts within {elapsed_s:.0f} s "
                    f"failed, the last one with {came}. Look at the server and its log."
                )
            self._sleep(wait_s)
        raise AssertionError("waits never end")

    def once(self, method: str, path: str, body: Any = None, *, upload: Upload | None = None) -> Answer:
        """Returns the answer to a single attempt. Raises NotAnswered."""
        return exchange(
            self.address,
            method,
            path,
            body,
            upload=upload,
            headers=self._headers,
            connect_s=self._bounds.connect_s,
            answer_s=self._bounds.answer_s,
        )

    def waits(self) -> Iterator[float]:
        """Yields the waits between attempts."""
        for failed in itertools.count():
            longest = min(self._bounds.longest_wait_s, self._bounds.first_wait_s * 2.0 ** min(failed, 30))
            yield longest * random.uniform(0.5, 1.0)

    def refused(self, what: str, answer: Answer) -> InputError:
        return InputError(f"the inference server {self.address} refuses to {what}: {answer.status}: {answer.words}")
