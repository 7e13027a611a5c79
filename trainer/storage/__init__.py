"""Objects in a folder: S3 and other stores that fsspec opens, this machine's file system, and memory for tests."""

from __future__ import annotations

from trainer.storage.backend import ObjectInfo
from trainer.storage.parallel import in_parallel
from trainer.storage.places import SourceObject, expand, local_path, locate, open_storage
from trainer.storage.retry import Retry
from trainer.storage.store import Storage, is_safe_key, to_json

__all__ = [
    "ObjectInfo",
    "Retry",
    "SourceObject",
    "Storage",
    "expand",
    "in_parallel",
    "is_safe_key",
    "local_path",
    "locate",
    "open_storage",
    "to_json",
]
