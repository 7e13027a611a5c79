"""Checkpoints that are complete or not visible at all (protocol.py describes how)."""

from __future__ import annotations

from trainer.checkpoint.blobs import put_checkpoint
from trainer.checkpoint.protocol import OnSkip, commit, list_commits, log_skip
from trainer.checkpoint.record import CommitRecord, FileEntry
from trainer.checkpoint.restore import fetch, fetch_newest, newest_complete
from trainer.checkpoint.retention import Retention
from trainer.run.claims import Claims, check_fence, claim_attempt, claim_driver, claim_driver_after, read_claims

__all__ = [
    "Claims",
    "CommitRecord",
    "FileEntry",
    "OnSkip",
    "Retention",
    "check_fence",
    "claim_attempt",
    "claim_driver",
    "claim_driver_after",
    "commit",
    "fetch",
    "fetch_newest",
    "list_commits",
    "log_skip",
    "newest_complete",
    "put_checkpoint",
    "read_claims",
]
