"""Prepares data once: cuts the inputs into windows, prepares the missing ones, and writes the manifest last.

Any number of processes and runs may prepare the same data at the same time, and may die at any point. Every object is
put only if absent, existing windows are not made again, and the manifest marks the data as complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from trainer.chat_templates.template import named_template
from trainer.data.blocks import BadRow
from trainer.data.prepare.encode import RowEncoder
from trainer.data.prepare.freeze import check_unchanged
from trainer.data.prepare.partial import BEGUN
from trainer.data.prepare.prepared import MANIFEST, PreparedDataset, manifest_of, open_prepared, sum_counts
from trainer.data.prepare.split import WINDOW_BYTES, cut, windows
from trainer.data.prepare.window import (
    WindowEntry,
    WindowJob,
    WindowTask,
    entry_of,
    index_key,
    too_many_bad_rows,
)
from trainer.data.readers import open_reader
from trainer.data.readers.body import SPAN_BYTES
from trainer.data.sample import RowError
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.errors import CorruptObject, InputError
from trainer.recipe.formats import CHAT_TEMPLATES
from trainer.registry import choose_hint
from trainer.storage import Storage, locate, to_json

_FIRST_ROWS = 8
_INDEX = re.compile(r"w(\d{6,})\.index")

MapWindows = Callable[[Callable[[WindowJob], WindowEntry], Sequence[WindowJob]], Iterable[WindowEntry]]


class PreparationProgress(NamedTuple):
    """The progress of a preparation: windows done, all windows (``of``), and the samples and tokens in those done."""

    windows: int
    of: int
    samples: int
    tokens: int


def prepare_dataset(
    spec: PreparationSpec,
    tokenizer: Any,
    shared: Storage,
    *,
    map_windows: MapWindows = map,
    on_progress: Callable[[PreparationProgress], None] | None = None,
    order: Callable[[int], Sequence[int]] = range,
    window_bytes: int = WINDOW_BYTES,
    span_bytes: int = SPAN_BYTES,
) -> PreparedDataset:
    """Opens the prepared data in ``<shared>/<fingerprint>/``. Prepares what is missing.

    ``map_windows(task, jobs)`` yields the results in the jobs' order; task and jobs can be pickled. ``order(count)``
    returns the order in which windows are made. ``window_bytes``: see `windows`; ``span_bytes``: see `open_reader`. If
    the data is complete, the inputs are not checked. Raises InputError if an input has changed, if there are more bad
    rows than allowed, or if a source gives no sample.
    """
    found = open_prepared(shared, spec.fingerprint)
    if found is not None:
        return found
    check_unchanged(spec.sources)
    folder = shared.child(spec.fingerprint)
    groups = windows(cut(spec.sources, span_bytes), spec.order_key, window_bytes)
    jobs = [WindowJob(i, spans) for i, spans in enumerate(groups)]
    if not folder.put_if_absent(BEGUN, to_json({"spec": spec.to_json(), "windows": len(jobs)})):
        raise CorruptObject(
            f"{folder.url} was started by a version of muster that cuts the inputs into other windows; delete it"
        )
    task = WindowTask(spec, tokenizer, folder.url)
    entries = _prepare_windows(task, folder, [jobs[i] for i in order(len(jobs))], map_windows, on_progress)
    _check_counts(spec, entries)
    folder.put_if_absent(MANIFEST, json.dumps(manifest_of(spec, entries), sort_keys=True).encode())
    prepared = open_prepared(shared, spec.fingerprint)
    assert prepared is not None
    return prepared


def _prepare_windows(
    task: WindowTask,
    folder: Storage,
    jobs: Sequence[WindowJob],
    map_windows: MapWindows,
    on_progress: Callable[[PreparationProgress], None] | None,
) -> list[WindowEntry]:
    """Prepares the windows that are missing. Returns the entries of all jobs, by window."""
    names = (_INDEX.fullmatch(o.key) for o in folder.list())
    done = {w: entry_of(folder, w, folder.read(index_key(w))) for w in sorted(int(m[1]) for m in names if m)}
    missing = [job for job in jobs if job.window not in done]
    total = sum_counts(list(done.values()), len(task.spec.sources))
    for job, entry in zip(missing, map_windows(task, missing), strict=True):
        done[job.window] = entry
        for sum_of_source, counts in zip(total, entry.counts, strict=True):
            sum_of_source.add(counts)
        if on_progress is not None:
            on_progress(
                PreparationProgress(len(done), len(jobs), sum(c.samples for c in total), sum(c.tokens for c in total))
            )
    return [done[window] for window in range(len(jobs))]


def _check_counts(spec: PreparationSpec, entries: Sequence[WindowEntry]) -> None:
    """Raises InputError for a source with too many bad rows over all windows, or without a sample."""
    for i, counts in enumerate(sum_counts(entries, len(spec.sources))):
        source = spec.sources[i]
        if counts.bad_rows > spec.max_bad_rows:
            urls = {o.url for o in source.objects}
            bad = [b for e in entries for b in e.bad_rows if b.url in urls]
            listed = "; ".join(f"{b.url}, {b.place}: {b.reason}" for b in bad[:3])
            raise InputError(
                f"data source {source.path}: {counts.bad_rows} bad rows, and {spec.max_bad_rows} are allowed "
                f"(data.max_bad_rows); the first: {listed}"
            )
        if counts.samples == 0 and source.part == "eval":
            continue  # a small source may have no row that is held out
        if counts.samples == 0:
            raise InputError(
                f"data source {source.path} gives no sample: {counts.rows} rows read, {counts.dropped} dropped because "
                f"no target token is left within {spec.sequence_length} tokens, {counts.bad_rows} bad"
            )

    held_out = all(source.part == "eval" for source in spec.sources)
    if held_out and not any(counts.samples for entry in entries for counts in entry.counts):
        raise InputError(
            f"data.eval_fraction {spec.sources[0].eval_fraction:g} holds out no row; raise it, or name evaluation data "
            "under data.eval"
        )


def check_first_rows(spec: PreparationSpec, tokenizer: Any) -> list[str]:
    """Reads and encodes the first rows of each source: a cheap check before anything is started. Returns what is odd
    about them, with their source.

    Raises InputError for a format that the tokenizer does not support, a missing column, or rows that cannot be read.
    """
    odd = [(source.path, _check_source(source, spec, tokenizer)) for source in spec.sources]
    return [f"{path}: {text}" for path, warnings in odd for text in warnings]


def _check_source(source: FrozenSource, spec: PreparationSpec, tokenizer: Any) -> list[str]:
    encoder, first = RowEncoder(source, tokenizer, spec), source.objects[0]
    reader = open_reader(source, first)
    bad = 0
    for piece in islice(reader.cut(), 1):
        for row, samples, _ in encoder.encode(list(islice(reader.rows(piece.start, piece.stop), _FIRST_ROWS))):
            if not isinstance(samples, RowError):
                continue
            bad += 1
            if bad > spec.max_bad_rows:
                raise too_many_bad_rows(BadRow(first.url, reader.place(row), samples.reason), spec.max_bad_rows)
    return list(encoder.warnings)


def resolve_chat_template(value: str | None) -> str | None:
    """Returns the text of data.chat_template: a name of muster's templates, a template, or the path of a file with
    one."""
    if value is None or "{" in value:
        return value
    if value in CHAT_TEMPLATES:
        return named_template(value)
    storage, key = locate(value)
    try:
        return storage.read(key).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"data.chat_template: {value} is not text in UTF-8 ({error.reason})") from error
    except FileNotFoundError as error:
        raise InputError(
            f"data.chat_template: {value!r} is no file, no Jinja template (it holds no '{{'), and none of muster's: "
            f"{', '.join(CHAT_TEMPLATES)}{choose_hint(value, CHAT_TEMPLATES)}"
        ) from error
