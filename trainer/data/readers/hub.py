"""Data sets through the `datasets` library: ``hf://owner/name[@revision][/config]``, and ``hf:///folder`` for a copy.

The library downloads a data set into its cache on the host (HF_HOME) and maps it into memory. A row's position is its
number in the split. The frozen address contains a commit of the Hub, so that every host reads the same rows later.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from trainer.data.readers import InputSlice
from trainer.data.readers.parquet import plain_rows
from trainer.data.sample import Row, RowError
from trainer.data.spec import FrozenObject
from trainer.errors import InputError

SPAN_BYTES = 2 << 20
_BATCH_ROWS = 512


class HubRef(NamedTuple):
    """An address of a data set. ``revision`` None is the newest one, ``config`` None the only or default one."""

    dataset: str
    config: str | None
    revision: str | None
    split: str

    @property
    def is_folder(self) -> bool:
        return self.dataset.startswith("/")

    def url(self, revision: str) -> str:
        """Returns the address with its resolved revision. `parse` reads it."""
        at = "" if self.is_folder else f"@{revision}"
        config = f"/{self.config}" if self.config else ""
        return f"hf://{self.dataset}{at}{config}#{self.split}"


def parse(url: str, split: str | None = None) -> HubRef:
    """Parses ``hf://name``, ``hf://owner/name``, ``hf://owner/name/config`` or ``hf:///folder``.

    A name may have an ``@revision``, the address a ``#split``. Raises InputError for other addresses.
    """
    path, _, written = url.removeprefix("hf://").partition("#")
    split = split or written or "train"
    if path.startswith("/"):
        return HubRef(path.rstrip("/"), None, None, split)
    owner, *rest = path.strip("/").split("/", 2)
    name, _, revision = (rest[0] if rest else owner).partition("@")
    if not name or (rest and "@" in owner):
        raise InputError(f"{url} names no data set; write hf://owner/name, hf://owner/name/config or hf:///a/folder")
    dataset = f"{owner}/{name}" if rest else name
    return HubRef(dataset, rest[1] if len(rest) > 1 else None, revision or None, split)


def freeze_dataset(url: str, split: str | None) -> FrozenObject:
    """Downloads the data set and freezes its present commit. Raises InputError if it cannot be downloaded."""
    address = parse(url, split)
    builder = _builder(address)
    rows = len(_open(address, builder))
    return FrozenObject(address.url(builder.hash), rows, f"{builder.hash}/{builder.config_id}")


def check_dataset(frozen: FrozenObject) -> FrozenObject:
    """Resolves the frozen address again. A folder may have changed; a commit of the Hub cannot."""
    address = parse(frozen.url)
    return freeze_dataset(frozen.url, None) if address.is_folder else frozen


class Hub:
    def __init__(self, frozen: FrozenObject) -> None:
        self.data = _opened(frozen.url, frozen.etag)
        self.row_bytes = max(self.data.data.nbytes // max(len(self.data), 1), 1)

    def cut(self) -> list[InputSlice]:
        step = max(SPAN_BYTES // self.row_bytes, 1)
        edges = [*range(0, len(self.data), step), len(self.data)]
        return [InputSlice(a, b, (b - a) * self.row_bytes) for a, b in pairwise(edges)]

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, Row | RowError]]:
        for first in range(start, stop, _BATCH_ROWS):
            yield from enumerate(plain_rows(self.data[first : min(first + _BATCH_ROWS, stop)]), first)

    def place(self, row: int) -> str:
        return f"row {row + 1}"


@functools.lru_cache(maxsize=8)
def _opened(url: str, etag: str) -> Any:
    address = parse(url)
    builder = _builder(address)
    if f"{builder.hash}/{builder.config_id}" != etag:
        raise InputError(
            f"the data set {url} has changed since it was frozen; restore it, or start a run under another name"
        )
    # The Arrow format returns values as they are stored: a label is its number, and no image or audio is decoded.
    return _open(address, builder).with_format("arrow")


def _builder(address: HubRef) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(address.dataset, address.config, revision=address.revision)
    except (FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        raise _not_loaded(address, error) from error


def _open(address: HubRef, builder: Any) -> Any:
    import datasets

    try:
        builder.download_and_prepare()
        return builder.as_dataset(split=address.split)
    except (datasets.exceptions.DatasetGenerationError, ConnectionError, ValueError, KeyError, OSError) as error:
        raise _not_loaded(address, error) from error


def _not_loaded(address: HubRef, error: Exception) -> InputError:
    config = f", configuration {address.config}" if address.config else ""
    return InputError(
        f"the data set {address.dataset}{config}, split {address.split}, cannot be loaded "
        f"({type(error).__name__}: {error}); if this host cannot reach the Hub, download it to a folder and give the "
        "path of its files"
    )
