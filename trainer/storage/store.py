"""`Storage`: one folder of a file system, with the rules that every part of a run relies on.

Each call either succeeds or raises FileNotFoundError (the object is missing), InputError (the user can fix it),
CorruptObject (an object is shorter than it should be) or StorageError (it failed until the deadline). It ends within
its deadline whatever the place does (retry.py): a call that hangs is abandoned.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import CorruptObject, InputError, MusterError, StorageError
from trainer.parsing import Malformed, parse_json
from trainer.storage.backend import Backend, Entries, Listing, Moved, Names, ObjectInfo, Transient
from trainer.storage.parallel import in_parallel
from trainer.storage.retry import Retry

T = TypeVar("T")
log = logging.getLogger(__name__)
_DOWNLOAD_PART = 16 * 2**20
_PARALLEL_PARTS = 4
_PARALLEL_DELETES = 8
_UPLOAD_WINDOW = 512 * 2**20
"""Most bytes of an upload that may be in transit before its first part has arrived."""


def is_safe_key(key: str) -> bool:
    """Returns whether ``key`` stays below the folder that it is relative to, and has only one spelling."""
    return bool(key) and "\\" not in key and "\0" not in key and all(p not in ("", ".", "..") for p in key.split("/"))


class Storage:
    """A folder of a file system; keys are relative to it (``commits/000001/…``). Thread-safe; pickles as its URL."""

    def __init__(self, url: str, backend: Backend, retry: Retry) -> None:
        self.url = url.rstrip("/") or "/"
        self._backend = backend
        self._retry = retry

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def child(self, prefix: str) -> Storage:
        """Returns the folder ``prefix`` inside this one; it need not exist."""
        return Storage(self.uri(prefix.strip("/")), self._backend, self._retry)

    def within(self, deadline_s: float) -> Storage:
        """Returns this folder with calls that end after ``deadline_s``, or its present deadline if that is shorter."""
        retry = replace(self._retry, deadline_s=min(deadline_s, self._retry.deadline_s))
        return Storage(self.url, self._backend, retry)

    def uri(self, key: str) -> str:
        """Returns the object's full URL or path, for messages and for readers elsewhere."""
        if not is_safe_key(key):
            raise ValueError(f"storage key {key!r} is empty, absolute or climbs out of {self.url}")
        return f"{self.url.rstrip('/')}/{key}"

    def read(self, key: str) -> bytes:
        path = self.uri(key)
        return self._call("read", path, lambda moved: self._backend.read(path))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Reads exactly ``stop - start`` bytes from ``start``. Raises CorruptObject when the object ends before
        ``stop``."""
        if not 0 <= start <= stop:
            raise ValueError(f"range {start}-{stop} of {key!r} is not a range")
        path = self.uri(key)
        if start == stop:
            return b""
        return self._call("read", path, lambda moved: self._exactly(path, start, stop), stop - start)

    def write(self, key: str, data: bytes) -> None:
        """Creates or replaces; readers see the old bytes or the new ones."""
        path = self.uri(key)
        self._call("write", path, lambda moved: self._backend.write(path, data), len(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Returns whether the object now holds ``data``: this call wrote it, or it existed with exactly these bytes.

        A caller that must be the only writer puts a nonce in ``data``.
        """
        # The bytes decide: a reply can be lost after the object was made, also inside the HTTP client, and the
        # repetition then finds its own object.
        path = self.uri(key)
        try:
            self._call("create", path, lambda moved: self._create(path, data), len(data))
            return True
        except FileExistsError:
            pass
        try:
            return self.read(key) == data
        except FileNotFoundError:  # deleted since: it no longer holds the data
            return False

    def list(self, prefix: str = "", *, containing: Collection[str] = ()) -> Listing:
        """Returns all objects below the folder ``prefix``, at any depth, sorted by key (which include the prefix).

        ``containing``: keys that the caller knows to exist. A listing that lacks one of them is incomplete: it is
        repeated, and raises StorageError at the deadline. A caller that deletes or claims by what a listing lacks has
        to name such keys.
        """
        prefix = prefix.strip("/")
        path = self.uri(prefix) if prefix else self.url
        lead = f"{prefix}/" if prefix else ""

        def look(moved: Moved) -> Listing:
            found = [info._replace(key=lead + info.key) for info in self._backend.list(path, moved)]
            if hidden := set(containing).difference(info.key for info in found):
                raise Transient(f"the listing does not show {min(hidden)}, which is there")
            return sorted(found)

        found = self._call("list", path, look)
        for info in found:
            if not is_safe_key(info.key):
                raise InputError(f"the name of {path}/{info.key.removeprefix(lead)} cannot be addressed: rename it")
        return found

    def entries(self, prefix: str = "") -> Entries:
        """Returns the objects and folders directly inside ``prefix``, sorted. The cost does not depend on the content
        of those folders."""
        prefix = prefix.strip("/")
        path = self.uri(prefix) if prefix else self.url
        found = self._call("list", path, lambda moved: self._backend.entries(path))
        lead = f"{prefix}/" if prefix else ""
        return Entries(sorted(o._replace(key=lead + o.key) for o in found.objects), sorted(found.folders))

    def folders(self, prefix: str = "") -> Names:
        """Returns the names of the folders directly inside ``prefix``, sorted."""
        return self.entries(prefix).folders

    def info(self, key: str) -> ObjectInfo | None:
        """Returns None when there is no such object."""
        path = self.uri(key)
        found = self._call("look at", path, lambda moved: self._backend.info(path))
        return found and found._replace(key=key)

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects; missing ones are no error."""
        # Deepest first, so that local folders are empty when the last object in them is deleted.
        by_depth: dict[int, list[str]] = {}
        for path in (self.uri(key) for key in keys):
            by_depth.setdefault(path.count("/"), []).append(path)
        for _, paths in sorted(by_depth.items(), reverse=True):
            in_parallel(
                lambda path: self._call("delete", path, lambda moved: self._backend.delete(path)),
                paths,
                _PARALLEL_DELETES,
            )

    def abort_uploads(self, prefix: str, stale: Callable[[str], bool]) -> int:
        """Clears unfinished uploads below the folder ``prefix`` for whose key (relative to it) ``stale`` returns True;
        returns how many. They cost money in S3 and appear in no listing."""
        path = self.uri(prefix.strip("/"))
        return self._call("clear unfinished uploads of", path, lambda moved: self._backend.abort_uploads(path, stale))

    def remove_empty_folders(self, prefix: str) -> None:
        """Removes what a deletion leaves on a disk at and below ``prefix``: empty folders, links to nothing."""
        path = self.uri(prefix.strip("/"))
        self._call("clear empty folders of", path, lambda moved: self._backend.remove_empty_folders(path))

    def read_json(self, key: str) -> Any:
        """Reads JSON. Raises CorruptObject when the object is not JSON, or is JSON that muster would not write."""
        data = self.read(key)
        try:
            return parse_json(data)
        except Malformed as error:
            raise CorruptObject(f"{self.uri(key)} is not JSON ({error}); it was written by something else") from error

    def write_json(self, key: str, value: Any) -> None:
        self.write(key, to_json(value))

    def upload(self, key: str, path: str | os.PathLike[str]) -> None:
        """Creates or replaces from a local file of any size."""
        target, source = self.uri(key), os.fspath(path)
        window = min(os.path.getsize(source), _UPLOAD_WINDOW)
        self._call("write", target, lambda moved: self._backend.upload(target, source, moved), window)

    def download(self, key: str, path: str | os.PathLike[str]) -> int:
        """Downloads into a local file, which appears only when it is complete; reads parts of 16 MiB in parallel.
        Returns the number of bytes."""
        info = self.info(key)
        if info is None:
            raise FileNotFoundError(f"{self.uri(key)} does not exist")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            self._fill(partial, key, info.size)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return info.size

    def check_writable(self) -> bool:
        """Writes, lists, reads and deletes a probe. Raises InputError that names the wrong permission, bucket or
        credential.

        Returns whether conditional put works. Where it does not, two drivers of one run that start in the same moment
        cannot be distinguished, and the caller has to warn about that.
        """
        folder, path = f".probe-{uuid.uuid4().hex}", self.url
        key = f"{folder}/probe"
        try:
            first = self.put_if_absent(key, b"1")
            second = self.put_if_absent(key, b"2")
            readable = self.read(key) in (b"1", b"2")
            self.list(folder, containing=[key])
            self.delete([key])
        except FileNotFoundError as error:
            raise InputError(
                f"{path} cannot be made, or does not keep what is written to it; choose another storage"
            ) from error
        except (InputError, StorageError) as error:  # about the folder, which the user knows
            raise type(error)(str(error).replace(self.uri(key), path).replace(self.uri(folder), path)) from error
        if not (first and readable):
            raise InputError(f"{path} does not give back what was written to it; choose another storage")
        return not second

    def _fill(self, partial: Path, key: str, size: int) -> None:
        with open(partial, "wb") as file:
            file.truncate(size)

            def part(start: int) -> None:
                data = self.read_range(key, start, min(size, start + _DOWNLOAD_PART))
                os.pwrite(file.fileno(), data, start)

            in_parallel(part, range(0, size, _DOWNLOAD_PART), _PARALLEL_PARTS)

    def _create(self, path: str, data: bytes) -> None:
        try:
            self._backend.create(path, data)
        except NotImplementedError:
            if self._backend.info(path) is not None:
                raise FileExistsError(path) from None
            self._backend.write(path, data)

    def _exactly(self, path: str, start: int, stop: int) -> bytes:
        data = self._backend.read_range(path, start, stop)
        if len(data) == stop - start:
            return data
        info = self._backend.info(path)
        if info is None:
            raise FileNotFoundError(path)
        if info.size < stop:
            raise CorruptObject(f"{path} has {info.size} bytes where at least {stop} were written; restore the object")
        raise Transient(f"{len(data)} of {stop - start} bytes came")

    def _call(self, verb: str, path: str, attempt: Callable[[Moved], T], transfer_bytes: int = 0) -> T:
        try:
            return self._retry.call(
                f"{verb} {path}", attempt, transfer_bytes=transfer_bytes, on_no_answer=self._backend.reconnect
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist") from error
        except MusterError:
            log.debug("could not %s %s", verb, path, exc_info=True)
            raise

    def __reduce__(self) -> tuple[Callable[[str], Storage], tuple[str]]:
        from trainer.storage.places import open_storage

        return partial(open_storage, deadline_s=self._retry.deadline_s), (self.url,)


def to_json(value: Any) -> bytes:
    """Returns UTF-8 JSON with sorted keys and a newline at the end. Raises ValueError for nan and inf, which JSON does
    not have."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
