"""The inputs, pinned: which objects a source stood for, and whether they are still what they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.data.prepare.label_set import label_set
from trainer.data.readers import reader_name
from trainer.data.spec import FrozenObject, FrozenSource, PreparationSpec, tokenizer_fingerprint
from trainer.errors import InputError
from trainer.storage import expand, locate

if TYPE_CHECKING:
    from trainer.recipe.sections.data import SourceSection


def freeze(sources: Sequence[SourceSection]) -> tuple[FrozenSource, ...]:
    """The objects behind each source, sorted by URL, with size and ETag. InputError names a source without any."""
    return tuple(_freeze(source) for source in sources)


def _freeze(source: SourceSection) -> FrozenSource:
    frozen = FrozenSource(
        source.path,
        source.format,
        (),
        dict(source.columns),
        source.template,
        header=source.header,
        sample_by=source.sample_by,
        labels=source.labels,
    )
    objects = (_dataset(source.path, source.split),) if frozen.is_hub else _objects(source.path)
    return replace(frozen, objects=objects)


def _dataset(path: str, split: str | None) -> FrozenObject:
    from trainer.data.readers.hub import freeze_dataset

    return freeze_dataset(path, split)


def describe(
    sources: Sequence[FrozenSource], tokenizer: Any, *, labels: Sequence[str] | None = None, **settings: Any
) -> PreparationSpec:
    """The preparation of these sources by this tokenizer; settings are PreparationSpec's other fields.

    ``labels`` is the label set of classification; without it, it is looked for in these sources. Evaluation data takes
    that of the training data.
    """
    labels = label_set(sources) if labels is None else tuple(labels)
    return PreparationSpec(tuple(sources), tokenizer_fingerprint(tokenizer), labels=labels, **settings)


def check_unchanged(sources: Iterable[FrozenSource]) -> None:
    """InputError naming the first object that is gone or not what was frozen; each source's path is listed once."""
    for source in sources:
        if source.is_hub:
            check_objects(source.objects)
            continue
        now = {o.url: o for o in _expand(source.path)}
        for old in source.objects:
            _check(old, now.get(old.url))


def check_objects(frozen: Iterable[FrozenObject]) -> None:
    """The same for single objects, each looked up by itself."""
    for old in frozen:
        _check(old, _current(old))


def _current(old: FrozenObject) -> FrozenObject | None:
    if "#" in old.url and old.url.startswith("hf://"):
        from trainer.data.readers.hub import check_dataset

        return check_dataset(old)
    storage, key = locate(old.url)
    info = storage.info(key)
    return FrozenObject(old.url, info.size, info.etag) if info is not None else None


def _check(old: FrozenObject, new: FrozenObject | None) -> None:
    if new == old:
        return
    what = "is gone" if new is None else f"has changed (size {old.size} then, {new.size} now; ETag {new.etag})"
    raise InputError(
        f"the input {old.url} {what} since this run was begun, and its prepared data is not complete; put the old "
        "object back, or start a run under another name"
    )


def _objects(path: str) -> tuple[FrozenObject, ...]:
    named = path.rsplit("/", 1)[-1]
    found = sorted(o for o in _expand(path) if o.url.rsplit("/", 1)[-1] == named or not _hidden(o.url))
    if not found:
        raise InputError(f"data source {path}: nothing there matches; check the path, the bucket and the wildcard")
    for frozen in found:
        reader_name(frozen.url)
    return tuple(found)


def _hidden(url: str) -> bool:
    """Markers and partial uploads that tools leave in a folder: _SUCCESS, .part."""
    return url.rsplit("/", 1)[-1].startswith((".", "_"))


def _expand(path: str) -> list[FrozenObject]:
    try:
        return [FrozenObject(o.url, o.size, o.etag) for o in expand(path)]
    except FileNotFoundError as error:
        raise InputError(f"data source {path} is not there ({error}); check the path and the bucket") from error
