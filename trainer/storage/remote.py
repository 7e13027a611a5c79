"""Stores that fsspec knows: S3 (s3fs), `memory://` for tests, and others where their package is installed.

Only retry.py retries, so botocore and s3fs make one attempt each. aiohttp still repeats a PUT by itself when a
kept-alive connection breaks, so a conditional put may answer "exists" about its own bytes: store.py compares them.
Credentials and endpoint come from the environment (AWS_*) and botocore's own files, never from a URL.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from trainer.errors import InputError
from trainer.redact import credential_in
from trainer.storage.backend import Entries, Listing, Moved, ObjectInfo, Transient, one_line

S3_PROTOCOLS = ("s3", "s3a")
_VERSION = "?versionId="  # s3fs reads the text after it as a version
_PART_RETRIES = 8  # per part of a large upload: without them a lost part would send the entire file again
_memory_lock = threading.Lock()

_CREDENTIAL_CODES = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidSecurity",
    "TokenRefreshRequired", "RequestTimeTooSkewed", "NotSignedUp", "UnrecognizedClientException",
}  # fmt: skip
_USER_CODES = {
    "InvalidBucketName", "InvalidArgument", "InvalidRequest", "InvalidURI", "KeyTooLongError", "EntityTooLarge",
    "MethodNotAllowed", "AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException",
    "InvalidObjectState", "InvalidStorageClass", "301", "405",
}  # fmt: skip
_UNSUPPORTED_CODES = {"NotImplemented", "501"}
_TRANSIENT_CLASSES = {  # by name, since botocore and aiohttp are imported only where s3fs is
    "HTTPClientError", "EndpointConnectionError", "ConnectionError", "IncompleteReadError", "ResponseParserError",
    "FlexibleChecksumError", "CredentialRetrievalError", "MetadataRetrievalError", "ClientError", "TimeoutError",
    "FSTimeoutError", "OSError",
}  # fmt: skip


def _code(error: BaseException) -> str:
    """Returns the store's own error code (``NoSuchBucket``), from the botocore error that s3fs translated, or ''."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _for_user(path: str, error: BaseException, code: str) -> InputError | None:
    """Returns the message for an error that only the user can fix; None when trying again may help."""
    detail = one_line(error)[:200]
    names = {c.__name__ for c in type(error).__mro__}
    if code == "NoSuchBucket":
        return InputError(
            f"the bucket {'/'.join(path.split('/')[:3])} does not exist; create it, or correct the address"
        )
    if code in _CREDENTIAL_CODES or names & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        return InputError(
            f"the storage did not accept the credentials for {path} ({detail}); set AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN, AWS_PROFILE), and AWS_ENDPOINT_URL where it is not Amazon's"
        )
    if isinstance(error, PermissionError):
        return InputError(
            f"no permission for {path} ({detail}); the credentials need to list, read, write and delete there "
            f"(a wrong key, or an object that is missing where listing is not allowed, is answered so as well)"
        )
    if code in _USER_CODES or ("BotoCoreError" in names and not names & _TRANSIENT_CLASSES):
        return InputError(f"the storage refused the request for {path} ({detail}); correct the address or the settings")
    return None


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    try:
        yield
    except (InputError, Transient, NotImplementedError):
        raise
    except Exception as error:
        code = _code(error)
        if code in _UNSUPPORTED_CODES:
            raise NotImplementedError(path) from error
        wrong = _for_user(path, error, code)
        if wrong is not None:
            raise wrong from error
        if code == "PreconditionFailed":
            raise FileExistsError(path) from error
        if isinstance(error, (FileNotFoundError, FileExistsError)):
            raise
        if {c.__name__ for c in type(error).__mro__} & _TRANSIENT_CLASSES:
            raise Transient(one_line(error)) from error
        raise


@functools.lru_cache(maxsize=16)
def _filesystem(protocol: str, attempts: int, pid: int, environment: int) -> Any:
    """Returns one file system per process, protocol and AWS_* environment, so that calls share a connection pool.

    ``pid`` and ``environment`` are only cache keys: fsspec's event loop does not survive a fork.
    """
    import fsspec  # type: ignore[import-untyped, unused-ignore]

    if protocol not in S3_PROTOCOLS:
        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 32}
    filesystem = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, config_kwargs=config)
    filesystem.retries = attempts
    return filesystem


def filesystem(url: str, attempts: int = 1) -> Any:
    """Returns the fsspec file system of a URL. Raises InputError when the scheme is unknown or its package is not
    installed."""
    protocol = url.split("://", 1)[0]
    if protocol in S3_PROTOCOLS:
        _check_endpoint()
    environment = hash(tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))
    try:
        return _filesystem(protocol, attempts, os.getpid(), environment)
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot open {url}: {one_line(error)}; use s3://, a local folder, or install it") from error


def _check_endpoint() -> None:
    """Raises InputError, which does not repeat them, for an endpoint with credentials, and for one that is no URL."""
    # botocore raises the same error for such an endpoint as for the network, so it would be retried.
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        value = os.environ.get(name)
        if not value:
            continue
        if "@" in value or credential_in(value):
            raise InputError(
                f"{name} carries a user name, a password or another credential; write it as http://HOST:PORT or "
                "https://HOST, and give credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or in "
                "~/.aws/credentials"
            )
        if not _is_endpoint(value):
            raise InputError(f"{name} is {value!r}, which is no URL; write http://HOST:PORT or https://HOST")


def _is_endpoint(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number
        return False


def etag_of(info: Mapping[str, Any]) -> str:
    """Returns the ETag, or a text that changes with the content where a store has none."""
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    return str(tag).strip('"') if tag else f"{modified_of(info)}-{info.get('size')}"


def modified_of(info: Mapping[str, Any]) -> float:
    """Returns unix s; 0.0 where the store does not report the time."""
    when = info.get("LastModified") or info.get("created") or info.get("updated") or info.get("mtime")
    if isinstance(when, datetime.datetime):
        return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()
    return float(when) if isinstance(when, (int, float)) else 0.0


class RemoteBackend:
    """Backend of fsspec stores. Paths are full URLs (``s3://bucket/key``). Pickles as its protocol."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol

    def _fs(self, attempts: int = 1) -> Any:
        return filesystem(f"{self.protocol}://", attempts)

    def read(self, path: str) -> bytes:
        with translated(path):
            if self.protocol in S3_PROTOCOLS:  # one GET; by default s3fs requests the size first
                return bytes(self._fs().cat_file(path, max_concurrency=1))
            return bytes(self._fs().cat_file(path))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        try:
            with translated(path):
                return bytes(self._fs().cat_file(path, start=start, end=stop))
        except Transient as error:
            if _code(error.__cause__ or error) in ("InvalidRange", "416"):
                return b""
            raise

    def write(self, path: str, data: bytes) -> None:
        with translated(path), self._guard():
            self._fs().pipe_file(path, data)

    def create(self, path: str, data: bytes) -> None:
        with translated(path), self._guard():
            self._fs().pipe_file(path, data, mode="create")

    def upload(self, path: str, source: str, moved: Moved) -> None:
        from fsspec.callbacks import Callback

        class Moving(Callback):  # type: ignore[misc, unused-ignore]
            def relative_update(self, inc: int = 1) -> None:
                moved()

        with translated(path), self._guard():
            self._fs(_PART_RETRIES).put_file(source, path, callback=Moving())

    def list(self, path: str, moved: Moved) -> Listing:
        with translated(path):
            fs = self._fs()
            if self.protocol in S3_PROTOCOLS:
                return _s3_entries(fs, path, "", moved).objects
            try:  # on_error: by default fsspec leaves out the folders that it cannot list
                return _entries(fs, path, fs.find(path, detail=True, on_error="raise").values()).objects
            except FileNotFoundError:
                return []

    def entries(self, path: str) -> Entries:
        with translated(path):
            fs = self._fs()
            if self.protocol in S3_PROTOCOLS:
                return _s3_entries(fs, path, "/", lambda: None)
            try:
                return _entries(fs, path, fs.ls(path, detail=True))
            except FileNotFoundError:
                return Entries([], [])

    def info(self, path: str) -> ObjectInfo | None:
        try:
            with translated(path):
                found = self._fs().info(path)
        except FileNotFoundError:
            return None
        if found.get("type") == "directory":
            return None
        return ObjectInfo(path, int(found["size"]), etag_of(found), modified_of(found))

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), translated(path):
            self._fs().rm_file(path)

    def abort_uploads(self, path: str, stale: Callable[[str], bool]) -> int:
        """Aborts unfinished multipart uploads."""
        if self.protocol not in S3_PROTOCOLS:
            return 0
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        with translated(path):
            fs = self._fs()
            bucket, lead = _bucket_and_lead(fs, path)
            # Not s3fs's own list of uploads, which ends after a thousand and takes no prefix.
            pages = _pages(fs, "list_multipart_uploads", markers, Bucket=bucket, Prefix=lead)
            found = [u for page in pages for u in page.get("Uploads", ()) if stale(str(u["Key"])[len(lead) :])]
            for upload in found:
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(found)

    def remove_empty_folders(self, path: str) -> None:
        """Does nothing: folders are prefixes of names."""

    def reconnect(self) -> None:
        # An abandoned request keeps its connection, and the pool has a limited number of them.
        _filesystem.cache_clear()

    def _guard(self) -> contextlib.AbstractContextManager[object]:
        # fsspec's memory store looks and then writes; only a lock makes its `create` exclusive between threads.
        return _memory_lock if self.protocol == "memory" else contextlib.nullcontext()


def _entries(fs: Any, path: str, found: Iterable[Mapping[str, Any]]) -> Entries:
    """Splits fsspec's entries into objects and folders below ``path``, with names relative to it."""
    root = fs._strip_protocol(path).rstrip("/") + "/"
    below = [(str(i["name"])[len(root) :].rstrip("/"), i) for i in found if str(i["name"]).startswith(root)]
    return Entries(
        [ObjectInfo(n, int(i["size"]), etag_of(i), modified_of(i)) for n, i in below if i["type"] != "directory"],
        [name for name, i in below if i["type"] == "directory"],
    )


def _bucket_and_lead(fs: Any, path: str) -> tuple[str, str]:
    """Returns the bucket, and the prefix of all keys below the folder ``path``."""
    bucket, key, _ = fs.split_path(path)
    return bucket, f"{key.rstrip('/')}/" if key.rstrip("/") else ""


def _s3_entries(fs: Any, path: str, delimiter: str, moved: Moved) -> Entries:
    """Returns all objects below ``path``; with the delimiter ``/`` its direct content. Leaves out markers of folders
    (keys that end in ``/``). Raises InputError for a name that s3fs cannot read back."""
    bucket, lead = _bucket_and_lead(fs, path)
    found = Entries([], [])
    for page in _listing_pages(fs, Bucket=bucket, Prefix=lead, Delimiter=delimiter):
        moved()
        for info in page.get("Contents", ()):
            key = str(info["Key"])[len(lead) :]
            if _VERSION in key:
                raise InputError(
                    f"{path} holds an object with {_VERSION!r} in its name, which cannot be read back: rename it"
                )
            if key and not key.endswith("/"):
                found.objects.append(ObjectInfo(key, int(info["Size"]), etag_of(info), modified_of(info)))
        found.folders.extend(str(folder["Prefix"])[len(lead) : -1] for folder in page.get("CommonPrefixes", ()))
    return found


def _listing_pages(fs: Any, **request: Any) -> Iterator[Mapping[str, Any]]:
    # A prefix without objects is an empty page, so a 404 that is not about the bucket is an answer of a proxy.
    try:
        yield from _pages(fs, "list_objects_v2", {"ContinuationToken": "NextContinuationToken"}, **request)
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":
            raise
        raise Transient(f"the listing was answered with {one_line(error)}") from error


def _pages(fs: Any, method: str, markers: Mapping[str, str], **request: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the replies to ``method`` from the first page to the last. ``markers``: for each parameter of the request
    that selects the next page, the field of the reply that holds its value."""
    at: dict[str, str] = {}
    while True:
        page: Mapping[str, Any] = fs.call_s3(method, **request, **at)
        yield page
        if not page.get("IsTruncated"):
            return
        following = {name: str(page.get(field, "")) for name, field in markers.items()}
        if following == at:
            raise Transient("the next page of the listing is the same page")
        at = following
