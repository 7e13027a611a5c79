"""The interface between the storage's rules (store.py) and the places where bytes are stored (local.py, remote.py).

It is no larger than this because everything else (retries, time limits, JSON, conditional writes that survive a lost
reply, verified downloads) is equal for every place and is built once, on top.

Errors are part of the contract. A backend raises only
    FileNotFoundError   the object does not exist: the place was looked at, and it has no such name
    FileExistsError     `create` found an object
    InputError          only the user can fix it: credentials, permission, a bucket that does not exist, a bad name
    NotImplementedError the store has no such operation (`create` on a store without conditional put)
    Transient           may succeed when tried again: the network, throttling, a server's failure, a short body

"Could not look" is never "nothing there": an operation that could not see all that it has to return raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol


class ObjectInfo(NamedTuple):
    """One stored object: ``key`` (relative to the folder of the call), size in bytes, a tag that changes with the
    content, and the time of modification in unix s."""

    key: str
    size: int
    etag: str
    modified: float


Listing = list[ObjectInfo]  # `list` itself names a method below
Names = list[str]
Moved = Callable[[], None]
"""Called by a long operation each time that it has made progress, so that a slow one is distinguished from a hung
one."""


class Entries(NamedTuple):
    """The direct content of a folder: objects, with keys relative to it, and names of folders."""

    objects: Listing
    folders: Names


class Transient(Exception):
    """An attempt failed, and another one may succeed; ``str`` is the cause in one line."""


class NoAnswer(Transient):
    """An attempt was abandoned because it made no progress. It may still take effect."""


class Backend(Protocol):
    """Reads and writes objects under absolute paths of one file system. Every method may be called from any thread, and
    may be abandoned by its caller (`trainer.storage.limit`)."""

    def read(self, path: str) -> bytes: ...

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Returns bytes ``start`` to ``stop``; fewer where the object ends earlier, or where the reply was cut."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Creates or replaces; a reader sees the old bytes or the new ones, never a mixture."""
        ...

    def create(self, path: str, data: bytes) -> None:
        """Writes unless an object exists (FileExistsError); atomic against every other writer; durable on return."""
        ...

    def upload(self, path: str, source: str, moved: Moved) -> None:
        """Creates or replaces from a local file of any size; durable on return."""
        ...

    def list(self, path: str, moved: Moved) -> Listing:
        """Returns all objects below a folder, at any depth and in any order, keys relative to it; none when there is no
        such folder."""
        ...

    def entries(self, path: str) -> Entries:
        """Returns the direct content of a folder, empty when there is no such folder. The cost does not depend on the
        content of its subfolders."""
        ...

    def info(self, path: str) -> ObjectInfo | None: ...

    def delete(self, path: str) -> None:
        """Deletes an object; a missing one is no error."""
        ...

    def abort_uploads(self, path: str, stale: Callable[[str], bool]) -> int:
        """Clears the remains of unfinished uploads below a folder for whose key (relative to it) ``stale`` returns
        True. Returns their number; 0 where a store keeps none."""
        ...

    def remove_empty_folders(self, path: str) -> None:
        """Removes the empty folders at and below a path, and links to what is gone; does nothing in a store that has
        no folders."""
        ...

    def reconnect(self) -> None:
        """Drops the connections. Called after an operation was abandoned, so that the next ones do not share a
        connection with it."""
        ...


def one_line(error: BaseException) -> str:
    """Returns the error's class and text without line breaks, for messages and logs."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
