"""The commit record: one JSON object that makes a checkpoint exist. Its own sha256 proves that it is complete."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from trainer.errors import CorruptObject, InputError
from trainer.parsing import Malformed, parse_json
from trainer.records import Count, read_record
from trainer.run import layout
from trainer.run.best import Best, Patience, read_best
from trainer.run.metrics import EvalMetrics, StepMetrics
from trainer.storage import is_safe_key, to_json

FORMAT = 1


class FileEntry(TypedDict):
    bytes: Count
    sha256: str


class _Head(TypedDict):
    """The fields that every format of the record has."""

    format: Count
    sha256: str


class RestoredState(TypedDict, total=False):
    """The fields of a record's state that are read by other parts than the ones that write them."""

    step: Count
    attempt: Count
    epoch: Count
    samples: Count
    world_size: Count
    total_steps: Count
    epochs: Count | None
    facts: Mapping[str, Any]
    scaler: Mapping[str, Any]
    task: Mapping[str, Any]
    best: Best | None
    early_stop: Patience | None
    ended_early: bool | None
    begins_from: Mapping[str, Any] | None


@dataclass(frozen=True)
class CommitRecord:
    """``files`` are relative to ``checkpoints/<checkpoint>/``; ``state`` is what training resumes from (cursor, world
    size, loss scale, …), free JSON; ``nonce`` distinguishes this record from another one under the same key;
    ``committed_at`` is ISO 8601 in UTC."""

    step: Count
    attempt: Count
    driver: Count
    nonce: str
    checkpoint: str
    files: Mapping[str, FileEntry]
    state: Mapping[str, Any]
    committed_at: str
    format: Count = FORMAT

    @property
    def key(self) -> str:
        return layout.commit(self.attempt, self.step)

    @property
    def best_key(self) -> tuple[int, int] | None:
        """(attempt, step) of the record of the best evaluation so far, which may be this one; None if none is kept."""
        best = read_best(self.state)
        return (best.attempt, best.step) if best else None

    def file_key(self, name: str) -> str:
        """Returns the key of one of ``files`` in the run."""
        return f"{layout.checkpoint(self.checkpoint)}/{name}"

    def to_json(self) -> bytes:
        """Returns the stored form. Equal records give equal bytes."""
        body = asdict(self)
        return to_json({**body, "sha256": _digest(body)})

    @staticmethod
    def from_json(data: bytes, where: str) -> CommitRecord:
        """Reads a record. Raises CorruptObject when the bytes are not what was written, a field has another type, or a
        name would leave the checkpoint's folder; InputError for a format of a newer muster."""
        try:
            body = parse_json(data)
            head = read_record(_Head, body)
            if head["format"] > FORMAT:
                raise InputError(
                    f"{where} has format {head['format']}, this muster reads up to {FORMAT}; update muster"
                )
            if _digest({name: value for name, value in body.items() if name != "sha256"}) != head["sha256"]:
                raise CorruptObject(f"{where} does not match its own sha256")
            record = read_record(CommitRecord, body)
            facts = read_record(RestoredState, record.state).get("facts", {})
            for metrics in (StepMetrics, EvalMetrics):  # the facts are those of the last step and evaluation together
                metrics.from_row({**facts, "step": record.step})
        except Malformed as error:
            raise CorruptObject(f"{where} is not a commit record ({error})") from error
        for name in (record.checkpoint, *record.files):
            if not is_safe_key(name) or (name == record.checkpoint and "/" in name):
                raise CorruptObject(f"{where} names {name!r}, which is outside the checkpoint's folder")
        return record


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(body)).hexdigest()
