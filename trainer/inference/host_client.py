"""The client of a `trainer.inference.host`: sends adapters to it, and asks it about its server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.errors import EngineFailed, InputError
from trainer.inference.exchange import Address, Answer, NotAnswered, Upload
from trainer.inference.host import API_KEY, HostState
from trainer.inference.patience import Bounds, PatientRequests
from trainer.inference.receiver import ADAPTERS, FILES, MARK, STATE
from trainer.parsing import JsonReader, Malformed
from trainer.records import read_record

SENT = (".safetensors", ".json")
STATE_S = 15.0
GONE_S = 60.0
"""A host that does not answer for so long is given up: its adapters are away with it."""
_POLL_S = 1.0
_PIECE_BYTES = 2**20


class HostClient:
    """A host that answers at ``address``. Thread-safe."""

    def __init__(
        self,
        address: str,
        state: HostState,
        bounds: Bounds,
        api_key: str | None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = PatientRequests(address, bounds, api_key, watch=self.watch, sleep=sleep)
        self._asks = PatientRequests(address, replace(bounds, answer_s=STATE_S), api_key)
        self._folder, self._sleep, self._clock = state["folder"], sleep, clock
        # The name that leads to the host from here: it may know itself by another.
        self.server = str(Address("http", self._requests.address.host, state["port"], ""))

    def __str__(self) -> str:
        return str(self._requests.address)

    def folder(self, name: str) -> str:
        """Returns the path of an adapter on the host."""
        return f"{self._folder}/{name}"

    def send(self, name: str, folder: Path) -> None:
        """Sends an adapter, which the host has completely afterwards, or not at all. Raises InputError where it has no
        room, and EngineFailed if it does not answer."""
        files = sorted(path for path in folder.iterdir() if path.suffix in SENT)
        sizes = [(path.name, path.stat().st_size) for path in files]
        upload = Upload(sum(size for _, size in sizes), lambda: _pieces(files), {FILES: json.dumps(sizes)})
        what = f"take the adapter {name}"
        answer = self._requests.ask(what, "PUT", f"{ADAPTERS}{name}", upload=upload, final=507)
        if answer.status != 200:
            raise self._requests.refused(what, answer)

    def remove(self, name: str) -> None:
        what = f"remove the adapter {name}"
        answer = self._requests.ask(what, "DELETE", f"{ADAPTERS}{name}")
        if answer.status != 200:
            raise self._requests.refused(what, answer)

    def watch(self) -> bool:
        """Waits while the server is started again; returns True if it was. Raises EngineFailed if it was given up, or
        if its host has gone."""
        waited, silent_since = False, self._clock()
        while True:
            try:
                state = _state_of(self._asks.once("GET", STATE))
            except NotAnswered as error:
                # A machine that refuses connections is there, and the process on it is not.
                refused = isinstance(error.__cause__, ConnectionRefusedError)
                if self._clock() - silent_since >= (2 * _POLL_S if refused else GONE_S):
                    raise EngineFailed(
                        f"the host of the vLLM server {self.server} has gone: {self}: {error}"
                    ) from error
            else:
                silent_since = self._clock()
                if state is None:
                    raise EngineFailed(f"{self} is no host of a vLLM server any more")
                if state["state"] == "failed":
                    raise EngineFailed(f"the host {self} has given its server up: {state['why']}", state["log"])
                if state["state"] == "ready":
                    return waited
                waited = True
            self._sleep(_POLL_S)


def find_host(address: str, bounds: Bounds, api_key: str | None) -> HostClient | None:
    """Returns the client of the host at ``address``; None if an inference server itself is there. Raises InputError if
    the host wants another key."""
    requests = PatientRequests(address, bounds, api_key)
    answer = requests.ask("say what it is", "GET", STATE)
    state = _state_of(answer)
    if state is None and _is_host(answer):
        raise InputError(f"{requests.address} wants another key: {answer.words}; set {API_KEY} to that of the host")
    return None if state is None else HostClient(address, state, bounds, api_key)


def _state_of(answer: Answer) -> HostState | None:
    try:
        return read_record(HostState, _value(answer)) if answer.status == 200 and _is_host(answer) else None
    except Malformed as error:
        raise EngineFailed(f"a host answered a state that cannot be read: {error}") from error


def _is_host(answer: Answer) -> bool:
    value = _value(answer)
    return isinstance(value, dict) and value.get(MARK) == 1


def _value(answer: Answer) -> Any:
    try:
        return JsonReader(unique=False).read(answer.body)
    except Malformed:
        return None


def _pieces(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
