"""The host's block cache: which errors give it up, and what it does then. Its users test what they store in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainer.storage.block_cache import BlockCache


@contextmanager
def room(size: int) -> Iterator[bool]:
    yield True


def whole(raw: bytes) -> bool:
    return raw == b"block"


def test_an_error_of_the_source_is_raised_and_does_not_give_the_cache_up(tmp_path: Path) -> None:
    warnings: list[OSError] = []
    cache = BlockCache(tmp_path / "cache", warnings.append)

    def gone() -> bytes:
        raise FileNotFoundError("the object")

    with pytest.raises(FileNotFoundError, match="the object"):
        cache.get("a", gone, whole, room)
    assert not cache.given_up
    assert cache.get("a", lambda: b"block", whole, room) == b"block"
    assert cache.get("a", gone, whole, room) == b"block"
    assert not warnings


def test_a_cache_that_is_given_up_warns_once_and_leaves_the_fetch_to_its_user(tmp_path: Path) -> None:
    warnings: list[OSError] = []
    cache = BlockCache(tmp_path / "cache", warnings.append)
    shutil.rmtree(tmp_path / "cache")
    fetched: list[str] = []

    def fetch() -> bytes:
        fetched.append("a")
        return b"block"

    assert cache.get("a", fetch, whole, room) == b"block", "the fetch that found the error is not lost"
    assert [cache.get("a", fetch, whole, room) for _ in range(2)] == [None, None]
    assert fetched == ["a"]
    assert len(warnings) == 1


def test_a_block_without_room_is_returned_and_not_stored(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", lambda error: None)

    @contextmanager
    def none(size: int) -> Iterator[bool]:
        yield False

    assert cache.get("a", lambda: b"block", whole, none) == b"block"
    assert not (tmp_path / "cache" / "a").exists()
    assert not cache.given_up
