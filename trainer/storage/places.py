"""From a URL or a path to a `Storage`, to one object, or to the list of objects that a glob means."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from trainer.errors import InputError
from trainer.storage.backend import Backend
from trainer.storage.local import LocalBackend
from trainer.storage.remote import RemoteBackend, etag_of, filesystem, translated
from trainer.storage.retry import Retry
from trainer.storage.store import Storage

_LOCAL_PROTOCOLS = ("file", "local")


class SourceObject(NamedTuple):
    """One input object: ``url`` opens with `locate`; ``etag`` changes with the content."""

    url: str
    size: int
    etag: str


def open_storage(url: str, *, deadline_s: float = 120.0) -> Storage:
    """The folder ``url``: an fsspec URL or a local path (made absolute). Nothing is contacted or created.

    ``deadline_s`` is the longest that one call goes on retrying. InputError for a scheme that cannot be opened and for
    credentials in the URL.
    """
    path = local_path(url)
    if path is not None:
        return Storage(path, LocalBackend(), Retry(deadline_s))
    protocol = checked_protocol(url)
    filesystem(url)
    return Storage(url, RemoteBackend(protocol), Retry(deadline_s))


def locate(url: str) -> tuple[Storage, str]:
    """The storage and key of one object; it need not exist."""
    path = local_path(url)
    folder, _, key = (path or url).rpartition("/")
    if not key or folder.endswith(":/"):
        raise InputError(f"{url!r} names a folder or a bucket, not an object; add the object's name")
    return open_storage(folder or "/"), key


def expand(url: str) -> list[SourceObject]:
    """The objects that a file, a folder (all below it; names with a leading dot or underscore left out) or a glob
    means, sorted by URL. Empty when there is none."""
    path = local_path(url)
    found = _expand_remote(url) if path is None else _expand_local(path)
    return sorted(found)


def local_path(url: str) -> str | None:
    """The absolute path when ``url`` means this machine's file system, else None."""
    protocol, separator, rest = url.partition("://")
    if separator and protocol not in _LOCAL_PROTOCOLS:
        return None
    path = unquote(rest) if separator else url
    if not path:
        raise InputError(f"{url!r} is no storage; give a folder or a URL such as s3://bucket/folder")
    return os.path.abspath(os.path.expanduser(path))


def checked_protocol(url: str) -> str:
    """The URL's scheme; InputError (which does not repeat them) when the URL carries credentials."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"the {parts.scheme}:// address carries a user name or a password; take them out, and give credentials "
            f"through the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or ~/.aws/credentials"
        )
    if not parts.netloc and parts.scheme != "memory":
        raise InputError(f"{url!r} lacks the bucket or host; write {parts.scheme}://bucket/folder")
    return url.split("://", 1)[0]


def _visible(relative: str) -> bool:
    return not any(part.startswith((".", "_")) for part in relative.split("/"))


def _expand_local(path: str) -> list[SourceObject]:
    backend: Backend = LocalBackend()
    if os.path.isdir(path):
        below = Storage(path, backend, Retry()).list()
        return [SourceObject(f"{path}/{o.key}", o.size, o.etag) for o in below if _visible(o.key)]
    paths: Iterable[str] = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    infos = [backend.info(p) for p in paths]
    return [SourceObject(o.key, o.size, o.etag) for o in infos if o is not None]


def _expand_remote(url: str) -> list[SourceObject]:
    checked_protocol(url)
    return Retry().call(f"list {url}", lambda: _list_remote(url))


def _list_remote(url: str) -> list[SourceObject]:
    with translated(url):
        fs = filesystem(url)
        try:
            found = fs.glob(url, detail=True) if glob.has_magic(url) else fs.find(url, detail=True)
            if not found:
                fs.ls(_fixed_part(url))  # a glob says nothing about a missing bucket; this does
        except FileNotFoundError as error:
            if error.__cause__ is not None:  # a bucket that does not exist is not an empty one
                raise
            return []
        root = fs._strip_protocol(url).rstrip("/") + "/"
        return [
            SourceObject(fs.unstrip_protocol(name), int(info["size"]), etag_of(info))
            for name, info in found.items()
            if info.get("type") != "directory" and not name.endswith("/") and _wanted(name, root)
        ]


def _fixed_part(url: str) -> str:
    """The folder that a glob looks in: ``s3://bucket/a`` of ``s3://bucket/a/b*/*.jsonl``."""
    fixed = url[: next((i for i, c in enumerate(url) if c in "*?["), len(url))]
    return fixed.rpartition("/")[0]


def _wanted(name: str, root: str) -> bool:
    return not name.startswith(root) or _visible(name[len(root) :])
