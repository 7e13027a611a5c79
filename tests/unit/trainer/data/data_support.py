"""Small data for the tests of trainer.data: a tokenizer, sources on disk, and prepared data of given lengths."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.quickstart.corpus import pretraining_texts
from launcher.quickstart.model import make_tokenizer
from trainer.data.blocks import Counts, WindowWriter
from trainer.data.loading.stream import Stream
from trainer.data.prepare.prepared import MANIFEST, PreparedDataset, manifest_of, open_prepared
from trainer.data.prepare.window import entry_of, index_key
from trainer.data.sample import Sample
from trainer.data.spec import FrozenObject, FrozenSource, PreparationSpec
from trainer.recipe import SourceSection
from trainer.storage import Storage, open_storage


@functools.cache
def tokenizer() -> Any:
    return make_tokenizer(pretraining_texts(seed=5, count=100), 384)


def memory() -> Storage:
    """A folder of its own in memory."""
    return open_storage(f"memory://{uuid.uuid4().hex}")


def source(path: str | Path, format: str = "completion", **more: Any) -> SourceSection:
    return SourceSection.model_validate({"path": str(path), "format": format, **more})


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encode_rows(form: Any, rows: Sequence[Any]) -> list[Any]:
    """Encodes rows; a list with one sample becomes that sample."""
    found = form.encode(rows)
    return [one[0] if isinstance(one, list) and len(one) == 1 else one for one in found]


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """Prompt and completion of uneven lengths."""
    return [
        {"prompt": f"Where does number {i} live? ", "completion": "in Ashford " * (1 + i % 5)}
        for i in range(start, start + count)
    ]


def made(windows: Sequence[Sequence[tuple[int, int]]], sequence_length: int, packing: bool = True) -> PreparedDataset:
    """Prepared data with samples (source, length) per window. Sample n of all has tokens n, n, …; all but the first are
    targets."""
    shared = memory()
    count = 1 + max((s for window in windows for s, _ in window), default=0)
    sources = tuple(
        FrozenSource(f"s{i}", "completion", (FrozenObject(f"memory://s{i}", len(windows), "x"),)) for i in range(count)
    )
    spec = PreparationSpec(sources, "tokenizer", sequence_length, packing)
    folder = shared.child(spec.fingerprint)
    entries, number = [], 0
    for w, window in enumerate(windows):
        writer = WindowWriter(block_bytes=200)
        counts = [Counts() for _ in sources]
        for s, length in window:
            target = np.arange(length) > 0
            writer.add(s, 0, number, Sample(np.full(length, number, np.int32), target))
            counts[s].add(Counts(1, 1, length, int(target.sum())))
            number += 1
        key, data, index = writer.finish(f"w{w:06d}", counts, [])
        folder.put_if_absent(key, data)
        folder.put_if_absent(index_key(w), index)
        entries.append(entry_of(folder, w, index))
    folder.put_if_absent(MANIFEST, json.dumps(manifest_of(spec, entries)).encode())
    prepared = open_prepared(shared, spec.fingerprint)
    assert prepared is not None
    return prepared


def stream(prepared: PreparedDataset, run: Storage, **settings: Any) -> Stream:
    given: dict[str, Any] = {
        "seed": 17,
        "sequence_length": prepared.spec.sequence_length,
        "packing": prepared.spec.packing,
        "weights": [1.0] * len(prepared.spec.sources),
        "global_batch": 4,
        "micro_batch": 2,
    }
    return Stream(prepared, run, **{**given, **settings})
