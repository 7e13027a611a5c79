"""Freezes the inputs: resolves each source to its objects, and checks later that they have not changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.formats import plugin_code
from trainer.data.prepare.label_set import label_set
from trainer.data.prepare.model_limits import stop_tokens, vocabulary
from trainer.data.readers import reader_name
from trainer.data.spec import FrozenObject, FrozenSource, PreparationSpec, tokenizer_fingerprint
from trainer.errors import InputError
from trainer.registry import choose_hint
from trainer.storage import expand, local_path, locate

if TYPE_CHECKING:
    from trainer.recipe.sections.data import SourceSection


MOST_NAMES = 1000
"""In a folder, of which one may be meant."""


def freeze(sources: Sequence[SourceSection]) -> tuple[FrozenSource, ...]:
    """Resolves each source to its objects, sorted by URL, with size and ETag. Raises InputError for one without any."""
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
        style=source.style,
        train_on=source.train_on,
        limit=source.limit,
        nulls=source.nulls,
        code=plugin_code(source.format),
    )
    if not frozen.is_hub:
        return replace(frozen, objects=_objects(source.path))
    from trainer.data.readers.hub import freeze_dataset

    return replace(frozen, objects=(freeze_dataset(source.path, source.split),))


def check_local_sources(sources: Iterable[SourceSection]) -> None:
    """Raises InputError for a source on this machine's disk that has no objects. It needs none of the libraries that
    take seconds to import."""
    freeze([source for source in sources if "://" not in source.path])


def describe(
    sources: Sequence[FrozenSource], tokenizer: Any, *, labels: Sequence[str] | None = None, **settings: Any
) -> PreparationSpec:
    """Returns the specification for these sources and this tokenizer; ``settings`` are PreparationSpec's other fields.

    ``labels`` is the label set of classification. Without it, the set is read from these sources. Evaluation data must
    be given the training data's.
    """
    labels = label_set(sources) if labels is None else tuple(labels)
    stops, size = stop_tokens(tokenizer), vocabulary(tokenizer)
    identity = tokenizer_fingerprint(tokenizer)
    return PreparationSpec(tuple(sources), identity, labels=labels, stops=stops, vocabulary=size, **settings)


def check_unchanged(sources: Iterable[FrozenSource]) -> None:
    """Raises InputError for the first object that is missing or has changed. Lists each source's path once."""
    for source in sources:
        if source.is_hub:
            check_objects(source.objects)
            continue
        now = {o.url: o for o in _expand(source.path)}
        for old in source.objects:
            _check(old, now.get(old.url))


def check_objects(frozen: Iterable[FrozenObject]) -> None:
    """Raises InputError like `check_unchanged`, for single objects. Looks up each of them on its own."""
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
        f"the input {old.url} {what} since this run was started, and its prepared data is not complete; restore the "
        "old object, or start a run under another name"
    )


def _objects(path: str) -> tuple[FrozenObject, ...]:
    named = path.rsplit("/", 1)[-1]
    found = []
    for frozen in sorted(_expand(path)):
        name = frozen.url.rsplit("/", 1)[-1]
        # Tools leave markers and partial uploads in a folder, such as _SUCCESS and .part.
        if name == named or not name.startswith((".", "_")):
            found.append(frozen)
    if not found:
        raise InputError(f"data source {path}: nothing there matches{_advice(path)}")
    for frozen in found:
        reader_name(frozen.url)
    return tuple(found)


def _advice(path: str) -> str:
    """Returns a hint at a name on this disk that is close to the path's, else what to check."""
    if local_path(path) is None:
        return "; check the path, the bucket and the wildcard"
    named = Path(path).expanduser()
    beside = (found.name for found in named.parent.glob("*"))
    return choose_hint(named.name, tuple(islice(beside, MOST_NAMES))) or "; check the path and the wildcard"


def _expand(path: str) -> list[FrozenObject]:
    try:
        return [FrozenObject(o.url, o.size, o.etag) for o in expand(path)]
    except FileNotFoundError as error:
        raise InputError(f"data source {path} does not exist ({error}); check the path and the bucket") from error
