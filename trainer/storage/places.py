"""Resolves a URL or a path to a `Storage`, to one object, or to the list of objects that match a glob."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from trainer.errors import InputError
from trainer.storage.backend import ObjectInfo
from trainer.storage.local import LocalBackend
from trainer.storage.remote import RemoteBackend, filesystem
from trainer.storage.retry import Retry
from trainer.storage.store import Storage

_AS_THEY_ARE = ("http", "https")  # their servers decide what a path means
_QUERY = re.compile(r"\?[A-Za-z][\w.-]*=")
_LOCAL_PROTOCOLS = ("file", "local")


class SourceObject(NamedTuple):
    """One input object: ``url`` opens with `locate`; ``etag`` changes with the content."""

    url: str
    size: int
    etag: str


def open_storage(url: str, *, deadline_s: float = 120.0) -> Storage:
    """Returns the folder ``url``, an fsspec URL or a local path (made absolute). Contacts and creates nothing.

    ``deadline_s`` is the longest time that one call retries. Raises InputError for a scheme that cannot be opened and
    for credentials in the URL.
    """
    path = local_path(url)
    if path is not None:
        return Storage(path, LocalBackend(), Retry(deadline_s))
    address = _remote_address(url)
    filesystem(address)
    return Storage(address, RemoteBackend(address.split("://", 1)[0]), Retry(deadline_s))


def locate(url: str) -> tuple[Storage, str]:
    """Returns the storage and key of one object, which need not exist."""
    folder, _, key = (local_path(url) or _remote_address(url)).rpartition("/")
    if not key or folder.endswith(":/"):
        raise InputError(f"{url!r} names a folder or a bucket, not an object; add the object's name")
    return open_storage(folder or "/"), key


def expand(url: str) -> list[SourceObject]:
    """Returns the objects of a file, a folder (all below it; names with a leading dot or underscore left out) or a glob
    (``*``, ``?``, ``[…]`` in a name, ``**`` for folders of any depth), sorted by URL. Empty when there is none.

    A name that exists is taken literally, brackets included. Raises when anything cannot be looked at: otherwise its
    objects would be missing from the training data without a message.
    """
    path = local_path(url)
    # S3 gives the reason of a refusal only in the reply to a listing, not in that for a single object: list first.
    looks = (_below, _itself, _matched) if path is None else (_itself, _below, _matched)
    address = path or _remote_address(url)
    return next((found for look in looks if (found := sorted(look(address)))), [])


def _itself(address: str) -> Iterator[SourceObject]:
    if "/" in address.partition("://")[2] or "://" not in address:
        folder, key = locate(address)
        if (info := folder.info(key)) is not None:
            yield SourceObject(address, info.size, info.etag)


def _below(address: str) -> Iterator[SourceObject]:
    folder = open_storage(address)
    for info in folder.list():
        if not any(part.startswith((".", "_")) for part in info.key.split("/")):
            yield _source(folder, info)


def _matched(address: str) -> Iterator[SourceObject]:
    if not glob.has_magic(address):
        return iter(())
    fixed = address[: next(i for i, c in enumerate(address) if c in "*?[")].rpartition("/")[0]
    folder = open_storage(fixed or "/")
    return (_source(folder, info) for info in _matching(folder, "", address[len(fixed) + 1 :].split("/")))


def _source(folder: Storage, info: ObjectInfo) -> SourceObject:
    return SourceObject(folder.uri(info.key), info.size, info.etag)


def local_path(url: str) -> str | None:
    """Returns the absolute path when ``url`` is on this machine's file system, else None."""
    protocol, separator, rest = url.partition("://")
    if separator and protocol not in _LOCAL_PROTOCOLS:
        return None
    path = unquote(rest) if separator else url
    if not path:
        raise InputError(f"{url!r} is no storage; give a folder or a URL such as s3://bucket/folder")
    return os.path.abspath(os.path.expanduser(path))


def checked_protocol(url: str) -> str:
    """Returns the URL's scheme. Raises InputError, which does not repeat them, when the URL carries credentials."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"the {parts.scheme}:// address carries a user name or a password; take them out, and give credentials "
            f"through the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or ~/.aws/credentials"
        )
    if not parts.netloc and parts.scheme != "memory":
        raise InputError(f"{url!r} lacks the bucket or host; write {parts.scheme}://bucket/folder")
    return url.split("://", 1)[0]


def _remote_address(url: str) -> str:
    """Returns the URL in its one spelling: ``s3`` for ``s3a``, and single slashes."""
    # A key with an empty part (``s3://$BUCKET/$PREFIX`` where the prefix begins with a slash) is written, but never
    # listed below its folder.
    protocol, rest = checked_protocol(url), url.split("://", 1)[1].rstrip("/")
    if protocol in _AS_THEY_ARE:
        return url
    if _QUERY.search(rest):
        raise InputError(
            f"{url.split('?')[0]!r} is followed by a query string (?…=…), which addresses in a storage do not have: "
            "leave it out; versions of an object cannot be chosen"
        )
    return f"{'s3' if protocol == 's3a' else protocol}://" + re.sub(r"(?<=[^/])/+", "/", rest)


def _matching(storage: Storage, folder: str, parts: Sequence[str]) -> Iterator[ObjectInfo]:
    """Yields the objects below ``folder`` whose names match the glob ``parts``; looks into matching folders only."""
    name, below = parts[0], f"{folder}/" if folder else ""
    if name == "**":
        yield from (o for o in storage.list(folder) if _fits(o.key.removeprefix(below).split("/"), parts))
    elif not glob.has_magic(name):
        if len(parts) > 1:
            yield from _matching(storage, below + name, parts[1:])
        elif (info := storage.info(below + name)) is not None:
            yield info
    elif len(parts) == 1:
        yield from (o for o in storage.entries(folder).objects if _fits([o.key.removeprefix(below)], parts))
    else:
        for inner in storage.entries(folder).folders:
            if _fits([inner], parts[:1]):
                yield from _matching(storage, below + inner, parts[1:])


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Returns whether a path's names match a glob's parts as in a shell: no wildcard matches a leading dot."""
    if not parts:
        return not names
    if parts[0] == "**":
        deeper = bool(names) and not names[0].startswith(".") and _fits(names[1:], parts)
        return deeper or (_fits(names, parts[1:]) if len(parts) > 1 else not names)
    hidden = bool(names) and names[0].startswith(".") and not parts[0].startswith(".")
    return bool(names) and not hidden and fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])
