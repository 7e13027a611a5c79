"""The seam between the storage's rules (store.py) and the places where bytes lie (local.py, remote.py).

It is no larger than this because everything else (retries, time limits, JSON, conditional writes that survive a lost
reply, verified downloads) is the same for every place and is built once, on top.

Errors are part of the contract. A backend raises nothing but
    FileNotFoundError   the object is not there: the place was looked at, and it has no such name
    FileExistsError     `create` found an object
    InputError          only the user can fix it: credentials, permission, a bucket that does not exist, a bad name
    NotImplementedError the store has no such operation (`create` on a store without conditional put)
    Transient           may work when tried again: the network, throttling, a server's bad day, a short body

"Could not look" is never "nothing there": an operation that could not see all that it was asked for raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol


class ObjectInfo(NamedTuple):
    """One stored object: ``key`` (relative to the folder asked), bytes, a tag that changes with the content, unix s."""

    key: str
    size: int
    etag: str
    modified: float


Listing = list[ObjectInfo]  # `list` itself names a method below
Names = list[str]
Moved = Callable[[], None]
"""Called by a long operation each time that it has come further, so that slow is told from hung."""


class Entries(NamedTuple):
    """The direct content of a folder: objects, with keys relative to it, and names of folders."""

    objects: Listing
    folders: Names


class Transient(Exception):
    """An attempt failed in a way that another attempt may not; ``str`` is the cause in one line."""


class NoAnswer(Transient):
    """An attempt was abandoned because it did not come further. It may still take effect."""


class Backend(Protocol):
    """Whole objects under absolute paths of one file system. Every method may be called from any thread, and may be
    abandoned by its caller (`trainer.storage.limit`)."""

    def read(self, path: str) -> bytes: ...

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``; fewer where the object ends before, or where the reply was cut."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Create or replace; a reader sees the old bytes or the new ones, never a mixture."""
        ...

    def create(self, path: str, data: bytes) -> None:
        """Write unless there is an object (FileExistsError); atomic against every other writer; durable on return."""
        ...

    def upload(self, path: str, source: str, moved: Moved) -> None:
        """`write` from a local file of any size; durable on return."""
        ...

    def list(self, path: str, moved: Moved) -> Listing:
        """All objects below a folder, any depth and order, keys relative to it; none when there is no such folder."""
        ...

    def entries(self, path: str) -> Entries:
        """Nothing when there is no such folder; cheap however much lies below its folders."""
        ...

    def info(self, path: str) -> ObjectInfo | None: ...

    def delete(self, path: str) -> None:
        """An object that is not there is no error."""
        ...

    def abort_uploads(self, path: str, stale: Callable[[str], bool]) -> int:
        """Clears the remains of unfinished uploads below a folder, where ``stale`` says so of the key (relative to it),
        and returns their number; 0 where a store keeps none."""
        ...

    def reconnect(self) -> None:
        """Called after an operation was abandoned: the next ones do not share a connection with it."""
        ...


def one_line(error: BaseException) -> str:
    """The error's class and text without line breaks, for messages and logs."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
