"""Every store that fsspec knows: S3 (s3fs), `memory://` for tests, and others where their package is installed.

Retrying is retry.py's business alone, so botocore and s3fs make one attempt each. aiohttp still repeats a PUT by
itself when a kept-alive connection breaks, so a conditional put may answer "exists" about its own bytes: store.py
compares them. Credentials and endpoint come from the environment (AWS_*) and botocore's own files, never from a URL.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from trainer.errors import InputError
from trainer.redact import credential_in
from trainer.storage.backend import Listing, Names, ObjectInfo, Transient, one_line

S3_PROTOCOLS = ("s3", "s3a")
_PARALLEL_DELETES = 8
_PART_RETRIES = 8  # of one part of a large upload: without them a lost part would send the whole file again
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
    """The store's own error code (``NoSuchBucket``), from the botocore error that s3fs translated, or ''."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _for_user(path: str, error: BaseException, code: str) -> InputError | None:
    """The sentence for an error that only the user can mend; None when trying again may help."""
    said = one_line(error)[:200]
    names = {c.__name__ for c in type(error).__mro__}
    if code == "NoSuchBucket":
        return InputError(
            f"the bucket {'/'.join(path.split('/')[:3])} does not exist; create it, or correct the address"
        )
    if code in _CREDENTIAL_CODES or names & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        return InputError(
            f"the storage did not accept the credentials for {path} ({said}); set AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN, AWS_PROFILE), and AWS_ENDPOINT_URL where it is not Amazon's"
        )
    if isinstance(error, PermissionError):
        return InputError(
            f"no permission for {path} ({said}); the credentials need to list, read, write and delete there "
            f"(a wrong key, or an object that is missing where listing is not allowed, is answered so as well)"
        )
    if code in _USER_CODES or ("BotoCoreError" in names and not names & _TRANSIENT_CLASSES):
        return InputError(f"the storage refused the request for {path} ({said}); correct the address or the settings")
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
    """One file system per process, protocol and AWS_* environment: a connection pool is worth sharing.

    ``pid`` and ``environment`` are there as cache keys only; fsspec's event loop does not survive a fork.
    """
    import fsspec  # type: ignore[import-untyped, unused-ignore]

    if protocol not in S3_PROTOCOLS:
        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 32}
    filesystem = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, config_kwargs=config)
    filesystem.retries = attempts
    return filesystem


def filesystem(url: str, attempts: int = 1) -> Any:
    """The fsspec file system of a URL; InputError when the scheme is unknown or its package is not installed."""
    protocol = url.split("://", 1)[0]
    if protocol in S3_PROTOCOLS:
        _check_endpoint()
    environment = hash(tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))
    try:
        return _filesystem(protocol, attempts, os.getpid(), environment)
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot open {url}: {one_line(error)}; use s3://, a local folder, or install it") from error


def _check_endpoint() -> None:
    """Raises InputError, which does not repeat them, for an endpoint with credentials: botocore fails of them as
    it does of the network, and would be tried again and again."""
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
    """ETag, or what changes with the content where a store has none."""
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    return str(tag).strip('"') if tag else f"{modified_of(info)}-{info.get('size')}"


def modified_of(info: Mapping[str, Any]) -> float:
    """Unix seconds, 0.0 where the store does not tell."""
    when = info.get("LastModified") or info.get("created") or info.get("updated") or info.get("mtime")
    if isinstance(when, datetime.datetime):
        return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()
    return float(when) if isinstance(when, (int, float)) else 0.0


class RemoteBackend:
    """Paths are whole URLs (``s3://bucket/key``). Pickles as its protocol."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol

    def _fs(self, attempts: int = 1) -> Any:
        return filesystem(f"{self.protocol}://", attempts)

    def read(self, path: str) -> bytes:
        with translated(path):
            if self.protocol in S3_PROTOCOLS:  # one GET; by default s3fs asks for the size first
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

    def upload(self, path: str, source: str) -> None:
        with translated(path), self._guard():
            self._fs(_PART_RETRIES).put_file(source, path)

    def list(self, path: str) -> Listing:
        with translated(path):
            fs = self._fs()
            found = fs.find(path, detail=True)
            root = fs._strip_protocol(path).rstrip("/") + "/"
        return [
            ObjectInfo(name[len(root) :], int(i["size"]), etag_of(i), modified_of(i))
            for name, i in found.items()
            if name.startswith(root) and i.get("type") != "directory" and not name.endswith("/")
        ]

    def folders(self, path: str) -> Names:
        try:
            with translated(path):
                entries = self._fs().ls(path, detail=True)
        except FileNotFoundError:
            return []
        return [e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory"]

    def info(self, path: str) -> ObjectInfo | None:
        try:
            with translated(path):
                found = self._fs().info(path)
        except FileNotFoundError:
            return None
        if found.get("type") == "directory":
            return None
        return ObjectInfo(path, int(found["size"]), etag_of(found), modified_of(found))

    def delete(self, paths: Sequence[str]) -> None:
        with ThreadPoolExecutor(_PARALLEL_DELETES) as pool:
            list(pool.map(self._delete_one, paths))

    def abort_uploads(self, path: str, stale: Callable[[str], bool]) -> int:
        """Multipart uploads; s3fs's own list stops at a thousand and knows no prefix."""
        if self.protocol not in S3_PROTOCOLS:
            return 0
        with translated(path):
            fs = self._fs()
            bucket, key, _ = fs.split_path(path)
            lead = f"{key.rstrip('/')}/"
            found = [u for u in _uploads(fs, bucket, lead) if stale(str(u["Key"])[len(lead) :])]
            for upload in found:
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(found)

    def _delete_one(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), translated(path):
            self._fs().rm_file(path)

    def _guard(self) -> contextlib.AbstractContextManager[object]:
        """fsspec's memory store looks and then writes; only a lock makes its `create` exclusive between threads."""
        return _memory_lock if self.protocol == "memory" else contextlib.nullcontext()


def _uploads(fs: Any, bucket: str, lead: str) -> Iterator[Mapping[str, Any]]:
    """All unfinished multipart uploads of keys that begin with ``lead``."""
    page: Mapping[str, Any] = {"IsTruncated": True}
    marker: dict[str, str] = {}
    while page.get("IsTruncated"):
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=lead, **marker)
        yield from page.get("Uploads", ())
        marker = {"KeyMarker": page.get("NextKeyMarker", ""), "UploadIdMarker": page.get("NextUploadIdMarker", "")}
