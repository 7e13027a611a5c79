"""The record of the job that was last submitted for a run. `status` and `cancel` find the job by it."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import CorruptObject
from trainer.parsing import Malformed
from trainer.records import UnixTime, read_record
from trainer.run import layout
from trainer.storage import Storage


@dataclass(frozen=True)
class Submission:
    """The newest job that was submitted for a run. ``time`` is unix s; ``recipe`` is the URL of its frozen recipe.
    ``shared``: the job trains other runs too, in the same processes."""

    kind: str
    id: str
    time: UnixTime
    recipe: str
    shared: bool = False

    @property
    def job(self) -> str:
        return f"{self.kind}:{self.id}"


def read_submission(run: Storage) -> Submission | None:
    """Returns None when nothing was submitted, or when the record is malformed."""
    try:
        return read_record(Submission, run.read_json(layout.SUBMISSION))
    except (FileNotFoundError, CorruptObject, Malformed):
        return None
