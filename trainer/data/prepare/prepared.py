"""Prepared data in the storage: the manifest, the windows' indexes, and their blocks."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from trainer.data.blocks import BadRow, BlockInfo, Counts, WindowIndex
from trainer.data.outputs import StoredOutputs
from trainer.data.prepare.window import WindowEntry, open_index
from trainer.data.spec import PreparationSpec
from trainer.errors import CorruptObject
from trainer.parsing import Malformed
from trainer.records import read_record
from trainer.storage import Storage

MANIFEST = "manifest.json"
_INDEXES_HELD = 4


@dataclass
class PreparedDataset:
    """Complete prepared data. ``storage`` is its own folder. ``outputs``: what a frozen model computed for its samples,
    which are read with them. Reads are checked by sha256. Thread-safe."""

    storage: Storage
    spec: PreparationSpec
    windows: list[WindowEntry]
    outputs: StoredOutputs | None = None
    _indexes: OrderedDict[int, WindowIndex] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def fingerprint(self) -> str:
        return self.spec.fingerprint

    @property
    def count(self) -> int:
        """The number of windows."""
        return len(self.windows)

    def ready(self, window: int) -> bool:
        """Returns True if the window exists. Only data that are still being prepared lack windows."""
        return True

    @property
    def totals(self) -> Counts:
        total = Counts()
        for counts in self.per_source:
            total.add(counts)
        return total

    @property
    def per_source(self) -> list[Counts]:
        """The counts of each source, in the recipe's order."""
        return sum_counts(self.windows, len(self.spec.sources))

    @property
    def bad_rows(self) -> list[BadRow]:
        """The first bad rows of each window, which were skipped. ``totals.bad_rows`` is the number of all."""
        return [bad for window in self.windows for bad in window.bad_rows]

    @property
    def warnings(self) -> list[list[str]]:
        """The oddities of each source's rows, each once, in the recipe's order of sources."""
        found: list[dict[str, None]] = [{} for _ in self.spec.sources]
        for window in self.windows:
            for warnings, of_source in zip(window.warnings, found, strict=False):
                of_source |= dict.fromkeys(warnings)
        return [list(warnings) for warnings in found]

    def index(self, window: int) -> WindowIndex:
        with self._lock:
            if window in self._indexes:
                self._indexes.move_to_end(window)
                return self._indexes[window]
        entry = self._entry(window)
        raw = read_verified(self.storage, entry.index, entry.sha256, lambda: self.storage.read(entry.index))
        index = open_index(self.storage, entry.index, raw)
        with self._lock:
            self._indexes[window] = index
            while len(self._indexes) > _INDEXES_HELD:
                self._indexes.popitem(last=False)
        return index

    def _entry(self, window: int) -> WindowEntry:
        return self.windows[window]

    def blocks(self) -> list[tuple[int, int]]:
        """Returns (window, block) of every block. Reads all indexes."""
        return [(w, block) for w in range(self.count) for block in range(len(self.index(w).meta.blocks))]

    def block_bytes(self, window: int, block: int) -> bytes:
        """Reads one block, by a ranged read."""
        meta = self.index(window).meta
        info: BlockInfo = meta.blocks[block]
        stop = info.offset + info.length
        return read_verified(
            self.storage, meta.data, info.sha256, lambda: self.storage.read_range(meta.data, info.offset, stop)
        )


def read_verified(storage: Storage, key: str, sha256: str, read: Callable[[], bytes]) -> bytes:
    """Returns the bytes of ``read()`` if they have this hash. Raises CorruptObject if they differ twice."""
    # The second read is for bytes that were damaged on the way.
    got = ""
    for _ in range(2):
        raw = read()
        got = hashlib.sha256(raw).hexdigest()
        if got == sha256:
            return raw
    raise CorruptObject(
        f"{storage.url}/{key}: read twice, and its bytes are not those that were written (sha256 {got[:12]}…, not "
        f"{sha256[:12]}…); delete the folder {storage.url}, and run again to prepare the data again"
    )


def sum_counts(windows: Sequence[WindowEntry], sources: int) -> list[Counts]:
    sums = [Counts() for _ in range(sources)]
    for window in windows:
        for total, counts in zip(sums, window.counts, strict=True):
            total.add(counts)
    return sums


def open_prepared(shared: Storage, fingerprint: str) -> PreparedDataset | None:
    """Opens prepared data of this fingerprint under ``shared``. Returns None if it is missing or not complete."""
    folder = shared.child(fingerprint)
    try:
        manifest = folder.read_json(MANIFEST)
    except FileNotFoundError:
        return None
    return _from_manifest(folder, fingerprint, manifest)


def manifest_of(spec: PreparationSpec, windows: Sequence[WindowEntry]) -> dict[str, Any]:
    return {"spec": spec.to_json(), "windows": [asdict(w) for w in windows]}


class _Manifest(TypedDict):
    spec: Any
    windows: list[WindowEntry]


def _from_manifest(folder: Storage, fingerprint: str, manifest: Any) -> PreparedDataset:
    try:
        found = read_record(_Manifest, manifest)
        spec = PreparationSpec.from_json(found["spec"])
        if spec.fingerprint != fingerprint:
            raise Malformed("it belongs to other data than its folder")
        if any(len(window.counts) != len(spec.sources) for window in found["windows"]):
            raise Malformed("a window has the counts of other sources")
    except Malformed as error:
        raise CorruptObject(f"{folder.url}/{MANIFEST} cannot be understood ({error}); delete {folder.url}") from error
    return PreparedDataset(folder, spec, found["windows"])
