"""The commit record: what makes a checkpoint exist, as one JSON object that proves itself whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from trainer import layout
from trainer.errors import CorruptObject, InputError
from trainer.storage import is_safe_key, to_json

FORMAT = 1


class FileEntry(TypedDict):
    bytes: int
    sha256: str


@dataclass(frozen=True)
class CommitRecord:
    """``files`` are relative to ``checkpoints/<checkpoint>/``; ``state`` is what training goes on from (cursor, world
    size, loss scale, …), free JSON; ``nonce`` tells this record from another one under the same key;
    ``committed_at`` is ISO 8601 in UTC."""

    step: int
    attempt: int
    driver: int
    nonce: str
    checkpoint: str
    files: Mapping[str, FileEntry]
    state: Mapping[str, Any]
    committed_at: str
    format: int = FORMAT

    @property
    def key(self) -> str:
        return layout.commit(self.attempt, self.step)

    def file_key(self, name: str) -> str:
        """Key of one of ``files`` in the run."""
        return f"{layout.checkpoint(self.checkpoint)}/{name}"

    def to_json(self) -> bytes:
        """The same record always gives the same bytes."""
        body = asdict(self)
        return to_json({**body, "sha256": _digest(body)})

    @staticmethod
    def from_json(data: bytes, where: str) -> CommitRecord:
        """CorruptObject when the bytes are not what was written, or a name would leave the checkpoint's folder;
        InputError for a format of a newer muster."""
        try:
            body = json.loads(data)
            digest = body.pop("sha256")
            newer = int(body["format"]) > FORMAT
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptObject(f"{where} is not a commit record ({type(error).__name__}: {error})") from error
        if newer:
            raise InputError(f"{where} has format {body['format']}, this muster reads up to {FORMAT}; update muster")
        if _digest(body) != digest:
            raise CorruptObject(f"{where} does not match its own sha256")
        try:
            record = CommitRecord(**body)
        except TypeError as error:
            raise CorruptObject(f"{where} is not a commit record ({error})") from error
        for name in (record.checkpoint, *record.files):
            if not is_safe_key(name) or (name == record.checkpoint and "/" in name):
                raise CorruptObject(f"{where} names {name!r}, which is outside the checkpoint's folder")
        return record


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(body)).hexdigest()
