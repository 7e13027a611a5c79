"""A storage round trip of one object, with the time of each step."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from trainer.errors import MusterError
from trainer.storage import Storage

T = TypeVar("T")
PAYLOAD_BYTES = 2**20
STEPS = ("put", "get", "list", "conditional put", "conditional put refused", "delete")


@dataclass
class RoundTrip:
    """The result of a round trip.

    ``seconds``: the time of each step in `STEPS` that was reached. ``conditional``: a second conditional put of other
    bytes was refused; None if that step was not reached. ``same_place``: this host sees the object that another host
    has put; None if that was not checked. ``error``: why the round trip stopped.
    """

    url: str
    seconds: dict[str, float] = field(default_factory=dict)
    conditional: bool | None = None
    same_place: bool | None = None
    error: str | None = None


def storage_roundtrip(storage: Storage, beacon: str | None = None) -> RoundTrip:
    """Puts, gets, lists, conditionally puts and deletes one object of 1 MiB below ``.probe-…``, which it leaves empty.

    ``beacon``: a key that another host has put. Errors of the storage are returned in ``error`` and not raised.
    """
    found = RoundTrip(storage.url)
    folder = storage.child(f".probe-{uuid.uuid4().hex}")
    try:
        _steps(folder, found)
        if beacon is not None:
            found.same_place = storage.info(beacon) is not None
    except FileNotFoundError:
        found.error = f"{storage.url} cannot be created, or does not keep what is written to it"
    except (MusterError, OSError) as error:
        text = str(error)
        for name in (f"{folder.url}/object", f"{folder.url}/claim", folder.url):
            text = text.replace(name, storage.url)  # the user knows only the storage's own address
        found.error = " ".join(text.split())
    return found


def _steps(folder: Storage, found: RoundTrip) -> None:
    payload = bytes(PAYLOAD_BYTES)

    def timed(step: str, act: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = act()
        found.seconds[step] = time.perf_counter() - begin
        return result

    timed("put", lambda: folder.write("object", payload))
    same = timed("get", lambda: folder.read("object")) == payload
    keys = [o.key for o in timed("list", folder.list)]
    first = timed("conditional put", lambda: folder.put_if_absent("claim", b"1"))
    second = timed("conditional put refused", lambda: folder.put_if_absent("claim", b"2"))
    kept = folder.read("claim")
    timed("delete", lambda: folder.delete(["object", "claim"]))
    found.conditional = first and not second and kept == b"1"
    if not same:
        found.error = f"{folder.url} does not return what was written to it"
    elif keys != ["object"]:
        found.error = f"{folder.url} does not list what was written to it"
    elif folder.list():
        found.error = f"{folder.url} still lists what was deleted"
