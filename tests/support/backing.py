"""A whole training run, in this process, over a folder whose every operation a test can watch or forbid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tests.support.training
import trainer.worker.attempt
from trainer.storage import Retry, Storage
from trainer.storage.backend import Listing, Moved
from trainer.storage.local import LocalBackend


class Watched(LocalBackend):
    """A folder's backend that calls ``before`` with (verb, path) ahead of what training asks of it. Prepared data is
    reopened by its path where it is made, which goes past this."""

    def __init__(self) -> None:
        self.before: Callable[[str, str], None] = lambda verb, path: None

    def read(self, path: str) -> bytes:
        self.before("read", path)
        return super().read(path)

    def write(self, path: str, data: bytes) -> None:
        self.before("put", path)
        super().write(path, data)

    def create(self, path: str, data: bytes) -> None:
        self.before("put", path)
        super().create(path, data)

    def upload(self, path: str, source: str, moved: Moved) -> None:
        self.before("put", path)
        super().upload(path, source, moved)

    def list(self, path: str, moved: Moved) -> Listing:
        self.before("list", path)
        return super().list(path, moved)

    def delete(self, path: str) -> None:
        self.before("delete", path)
        super().delete(path)


def watch(monkeypatch: pytest.MonkeyPatch, folder: Path, deadline_s: float = 2.0) -> Watched:
    """Makes `train_here`, and what it calls, use the backend that is returned for the storage ``folder``."""
    backend = Watched()
    storage = Storage(str(folder), backend, Retry(deadline_s, first_s=0.01, cap_s=0.05))

    def opened(url: str, **_: object) -> Storage:
        assert url == storage.url
        return storage

    monkeypatch.setattr(tests.support.training, "open_storage", opened)
    monkeypatch.setattr(trainer.worker.attempt, "open_storage", opened)
    return backend
