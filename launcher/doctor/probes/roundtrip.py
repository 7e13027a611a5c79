"""One object's way through a storage, each step with its time."""

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
    """``seconds`` of each step of `STEPS` that was reached. ``conditional``: whether a second conditional put of other
    bytes was refused, None when it did not come to that. ``same_place``: whether this host sees what another one put
    there, None when nobody asked. ``error``: why it went no further."""

    url: str
    seconds: dict[str, float] = field(default_factory=dict)
    conditional: bool | None = None
    same_place: bool | None = None
    error: str | None = None


def storage_roundtrip(storage: Storage, beacon: str | None = None) -> RoundTrip:
    """Puts, gets, lists, conditionally puts and deletes one object of 1 MiB below ``.probe-…``, which it leaves empty.

    ``beacon``: a key that another host has put. Raises nothing for what a storage does: that is what is asked for."""
    found = RoundTrip(storage.url)
    folder = storage.child(f".probe-{uuid.uuid4().hex}")
    try:
        _steps(folder, found)
        if beacon is not None:
            found.same_place = storage.info(beacon) is not None
    except FileNotFoundError:
        found.error = f"{storage.url} cannot be made, or does not keep what is written to it"
    except (MusterError, OSError) as error:
        found.error = _of_folder(str(error), folder.url, storage.url)
    return found


def _of_folder(text: str, probed: str, url: str) -> str:
    """What an error says of a probe's object, said of the folder, which the user knows."""
    for name in (f"{probed}/object", f"{probed}/claim", probed):
        text = text.replace(name, url)
    return " ".join(text.split())


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
        found.error = f"{folder.url} does not give back what was written to it"
    elif keys != ["object"]:
        found.error = f"{folder.url} does not list what was written to it"
    elif folder.list():
        found.error = f"{folder.url} still lists what was deleted"
