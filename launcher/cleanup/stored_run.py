"""Deletes a run from its storage.

Whoever deletes a run holds it, as a driver does: a run that is alive is refused (`Lease.acquire` watches it), and a run
that begins meanwhile is refused, since it finds a holder that is alive. The order of deletion keeps readers from taking
a half-deleted run for a complete one:

    1. ``recipe.yaml``. Every reader of a run begins with it, so that from here on there is no run.
    2. The commit records, and of each adapter and checkpoint the configuration without which no library loads it; and
       the old job. A job that is submitted from now on belongs to a new run, and stays.
    3. Everything else but the claims and the lease.
    4. The claims of others, the lease, and at last the own claim. A run that begins in between claims the next number,
       which is not among the deleted ones; its lease may be deleted once, and it writes the lease again within seconds.

A deletion that was interrupted leaves the lease and its claim, and the same command continues it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from trainer.errors import MusterError, RunHeld, StorageError
from trainer.run import layout
from trainer.run.claims import read_claims
from trainer.run.frozen import no_run
from trainer.run.lease import ENDED, Lease, is_cancelled, is_held, read_owner
from trainer.run.submission import read_submission
from trainer.storage import ObjectInfo, Storage

MARKERS = (layout.RECIPE, layout.LEASE, layout.SUBMISSION)
LOADABLE = ("adapter_config.json", "config.json")
JOB = (layout.SUBMISSION, layout.SUBMITTED)
AT_ONCE = 500
"""Objects that are deleted between two looks at the claims."""
LATE_OBJECTS_TRIES = 3


@dataclass(frozen=True)
class StoredRun:
    """A run that may be deleted: its objects, and those in its folder that are not its own and stay."""

    storage: Storage
    name: str
    state: str
    objects: Sequence[ObjectInfo]
    others: Sequence[str]

    @property
    def run(self) -> Storage:
        return self.storage.child(self.name)

    @property
    def bytes(self) -> int:
        return sum(info.size for info in self.objects)

    @property
    def checkpoints(self) -> int:
        return sum(layout.parse_commit(info.key) is not None for info in self.objects)


def find_run(storage: Storage, name: str) -> StoredRun:
    """Looks at a run. Raises InputError when there is none, RunHeld when it is running or its job is still to start."""
    run = storage.child(name)
    owner = read_owner(run)
    if owner is not None and is_held(run, owner):
        raise RunHeld(f"{run.url} is running ({owner.holder}); stop it first: muster cancel {run.url}")
    made = read_submission(run)
    if made is not None and (owner is None or owner.time <= made.time) and not is_cancelled(run, made.job):
        waits = f"{made.job} was submitted for {run.url} and has not started"
        raise RunHeld(f"{waits}; end it first: muster cancel {run.url}")
    objects = run.list()
    own = [info for info in objects if layout.is_of_run(info.key)]
    if not any(info.key in MARKERS or info.key.startswith(f"{layout.CLAIMS}/") for info in own):
        raise no_run(run)
    state = owner.state if owner is not None and owner.state in ENDED else "interrupted"
    return StoredRun(storage, name, state, own, [info.key for info in objects if not layout.is_of_run(info.key)])


def delete_run(found: StoredRun) -> int:
    """Deletes the run's objects, and returns their number. Raises RunHeld when the run has begun meanwhile; nothing is
    deleted then."""
    run = found.run
    lease = Lease.acquire(run)
    try:
        count = _delete_all(found, lease)
    except BaseException:
        with suppress(MusterError):
            lease.release("interrupted")
        raise
    lease.release("interrupted")
    run.delete([layout.LEASE])
    run.delete([layout.driver_claim(lease.driver)])
    found.storage.remove_empty_folders(found.name)
    return count


def _delete_all(found: StoredRun, lease: Lease) -> int:
    """Deletes all but the lease and the own claim. Lists again after it: a worker that was cut off may have written."""
    run, count = found.run, 0
    claim = layout.driver_claim(lease.driver)
    kept = (layout.LEASE, claim)
    for listing in range(LATE_OBJECTS_TRIES):
        # A listing that lacks the own claim, which was just written, may lack others as well.
        listed = [info.key for info in run.list(containing=[claim])]
        keys = [key for key in listed if layout.is_of_run(key) and key not in kept]
        if listing:
            keys = [key for key in keys if key.partition("/")[0] not in JOB]
        if not keys:
            found.storage.abort_uploads(found.name, lambda key: not key.startswith((layout.LEASE, layout.CLAIMS)))
            return count
        for part in in_order(keys):
            for start in range(0, len(part), AT_ONCE):
                newest = read_claims(run, known=[claim]).driver
                if newest > lease.driver:
                    taken = f"driver {newest} has taken {run.url} over while it was deleted"
                    raise RunHeld(f"{taken}; a part of it is gone")
                run.delete(part[start : start + AT_ONCE])
        run.remove_empty_folders(layout.WANDB)  # its links to what is gone would fail the next listing
        count += len(keys)
    raise StorageError(f"a process still writes to {run.url} while it is deleted; end it, and run the command again")


def in_order(keys: Sequence[str]) -> Iterator[list[str]]:
    """Yields the keys in parts, each to be deleted before the next: see above."""
    parts: list[list[str]] = [[], [], [], []]
    for key in keys:
        folder, name = key.split("/")[0], key.rsplit("/")[-1]
        early = folder in (layout.COMMITS, *JOB) or (
            folder in (layout.ADAPTER, layout.CHECKPOINTS) and name in LOADABLE
        )
        parts[0 if key == layout.RECIPE else 1 if early else 3 if folder == layout.CLAIMS else 2].append(key)
    yield from (part for part in parts if part)
