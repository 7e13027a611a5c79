"""The final adapter: the files of a checkpoint, without its training state, at an address that never changes. It is the
last checkpoint, or the one of the best evaluation (`checkpoint.keep_best`) that the last commit record names.

They are copied from a committed checkpoint, object by object, so that an interrupted copy is simply repeated. A run
counts as finished only when every one of them reads back with the hash of the commit record.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.protocol import list_commits, read_commit
from trainer.checkpoint.record import CommitRecord
from trainer.errors import CorruptObject, InputError
from trainer.recipe import TrainingSection
from trainer.run import layout
from trainer.run.best import ended_early
from trainer.run.frozen import read_recipe
from trainer.storage import Storage

log = logging.getLogger(__name__)

TOTAL_STEPS = "total_steps"
EPOCHS = "epochs"
"""The recipe's, in the state of a run whose length is given in epochs."""
OPTIMIZER_FILE = "optimizer.safetensors"
MASTER_FILE = "master.safetensors"
METHOD_FILE = "method.safetensors"
STATE_FILES = (OPTIMIZER_FILE, MASTER_FILE, METHOD_FILE)
"""Files of a checkpoint that only training needs."""

READ_BYTES = 16 * 2**20
FileInfo = Mapping[str, Any]


def is_last(record: CommitRecord, length: TrainingSection | None = None) -> bool:
    """Returns True for the commit of its run's last step, which may have ended early. ``length``: of the recipe, if it
    may be longer than the one that the commit was trained with."""
    if ended_early(record.state, length):
        return True
    if record.step < int(record.state.get(TOTAL_STEPS, record.step + 1)):
        return False
    if length is None:
        return True
    epochs = record.state.get(EPOCHS)
    return record.step >= (length.steps or 0) and (epochs is None or epochs >= (length.epochs or 0))


def finished(run: Storage, length: TrainingSection | None = None) -> CommitRecord | None:
    """Returns the commit of the last step, with its adapter published and verified; None when training has to continue.
    ``length``: see `is_last`.

    Completes a run that died between its last commit and the last copy. Where the last checkpoint itself is damaged,
    returns None: training resumes from the newest complete one.

    Raises CorruptObject when the adapter does not read back as it was committed, InputError for more epochs than a run
    of an older version can get."""
    newest = next(iter(list_commits(run)), None)
    if newest is None or not is_last(newest, length):
        return None
    epochs = length.epochs if length and EPOCHS not in newest.state else None
    if epochs is not None and epochs != read_recipe(run).training.epochs:
        raise InputError(
            f"{run.url} was finished by a version of muster that did not record its epochs, so that it cannot become "
            "longer; run it with its own training.epochs, or give the new recipe another name"
        )
    chosen = chosen_of(run, newest)
    if is_published(run, chosen):
        return newest
    try:
        publish(run, chosen)
    except (CorruptObject, FileNotFoundError) as error:
        if chosen.key != newest.key:
            raise CorruptObject(
                f"the best checkpoint of {run.url}, of step {chosen.step}, is damaged ({error}); restore its files, or "
                f"delete {run.uri(chosen.key)}, after which the same command publishes the last one in its place"
            ) from error
        log.warning("the last checkpoint of %s is damaged, its steps are trained again: %s", run.url, error)
        return None
    if not is_published(run, chosen):
        raise CorruptObject(f"{run.uri(layout.ADAPTER)} does not read back as it was committed; run again")
    return newest


def completed_text(last: CommitRecord) -> str:
    """Returns how a run was completed, as a clause. ``last``: the commit of its last step."""
    early = ended_early(last.state)
    return f"has ended early at step {last.step} ({early})" if early else "has reached its last step"


def chosen_of(run: Storage, last: CommitRecord) -> CommitRecord:
    """Returns the commit that becomes the final adapter: that of the best evaluation if the ``last`` one names it, else
    ``last`` itself, also if the record of the best one does not exist any more."""
    key = last.best_key
    if key is None or key == (last.attempt, last.step):
        return last
    chosen = read_commit(run, key)
    if chosen is None:
        log.warning("%s has no readable %s, its best checkpoint; the last one counts", run.url, layout.commit(*key))
    return chosen or last


def published_files(record: CommitRecord) -> dict[str, FileInfo]:
    return {name: info for name, info in record.files.items() if name not in STATE_FILES}


def publish(run: Storage, record: CommitRecord) -> str:
    """Deletes files that do not belong to the adapter, copies those that are missing or differ; returns its URI.

    Deletes first: after the last copy nothing is left to do, and `is_published` need not look for surplus files."""
    wanted = published_files(record)
    stale = [o.key for o in run.list(layout.ADAPTER) if o.key.removeprefix(f"{layout.ADAPTER}/") not in wanted]
    run.delete(stale)
    with tempfile.TemporaryDirectory(prefix="muster-publish-") as folder:
        for name, info in wanted.items():
            if not reads_back(run, f"{layout.ADAPTER}/{name}", info):
                _copy(run, f"{layout.checkpoint(record.checkpoint)}/{name}", f"{layout.ADAPTER}/{name}", info, folder)
    return run.uri(layout.ADAPTER)


def is_published(run: Storage, record: CommitRecord) -> bool:
    """Reads every file of the final adapter and compares its sha256 with the record's."""
    wanted = published_files(record)
    return bool(wanted) and all(reads_back(run, f"{layout.ADAPTER}/{n}", i) for n, i in wanted.items())


def _copy(run: Storage, source: str, target: str, info: FileInfo, folder: str) -> None:
    local = Path(folder, Path(target).name)
    run.download(source, local)
    with local.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != info["sha256"]:
        raise CorruptObject(f"{run.uri(source)} is not what was committed")
    run.upload(target, local)
    local.unlink()


def reads_back(run: Storage, key: str, info: FileInfo) -> bool:
    """Returns whether the object has the bytes of a commit record's entry. Memory: ``READ_BYTES``."""
    found, size = run.info(key), int(info["bytes"])
    if found is None or found.size != size:
        return False
    digest = hashlib.sha256()
    for start in range(0, size, READ_BYTES):
        digest.update(run.read_range(key, start, min(size, start + READ_BYTES)))
    return digest.hexdigest() == str(info["sha256"])
