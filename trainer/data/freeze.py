"""The inputs, pinned: which objects a source stood for, and whether they are still what they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from trainer.data.readers import reader_name
from trainer.data.spec import FrozenObject, FrozenSource
from trainer.errors import InputError
from trainer.storage import expand, locate

if TYPE_CHECKING:
    from trainer.recipe.data import SourceSection


def freeze(sources: Sequence[SourceSection]) -> tuple[FrozenSource, ...]:
    """The objects behind each source, sorted by URL, with size and ETag. InputError names a source without any."""
    return tuple(FrozenSource(s.path, s.format, _objects(s.path), dict(s.columns), s.template) for s in sources)


def check_unchanged(sources: Iterable[FrozenSource]) -> None:
    """InputError naming the first object that is gone or not what was frozen; each source's path is listed once."""
    for source in sources:
        now = {o.url: o for o in _expand(source.path)}
        for old in source.objects:
            _check(old, now.get(old.url))


def check_objects(frozen: Iterable[FrozenObject]) -> None:
    """The same for single objects, each looked up by itself."""
    for old in frozen:
        storage, key = locate(old.url)
        info = storage.info(key)
        _check(old, FrozenObject(old.url, info.size, info.etag) if info is not None else None)


def _check(old: FrozenObject, new: FrozenObject | None) -> None:
    if new == old:
        return
    what = "is gone" if new is None else f"has changed ({old.size} bytes then, {new.size} now; ETag {new.etag})"
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
