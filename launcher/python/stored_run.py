"""``muster.Run``: a run in its storage."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError
from trainer.storage import Storage, open_storage

if TYPE_CHECKING:
    from launcher.monitor.status import CheckpointStatus, Status
    from trainer.run.events import Event

DEADLINE_S = 30.0


@dataclass(frozen=True)
class Run:
    """A run of any state, read from its storage on any machine. ``uri``: its folder, as ``muster ls`` prints it.

    Every method reads the storage again, and raises InputError if there is no run, StorageError if the storage does not
    answer."""

    uri: str

    def status(self) -> Status:
        """Returns state, step, newest metrics, checkpoints and failure: the fields of ``muster status --json``."""
        from launcher.monitor.status import read_status

        return read_status(self._storage())

    def metrics(self) -> Any:
        """Returns the rows of the metrics of all attempts, in their order: a `pandas.DataFrame` where pandas is
        installed, else a list of dictionaries. Steps that an attempt repeats are there twice."""
        from trainer.run import layout
        from trainer.run.jsonl import read_rows

        rows = read_rows(self._known(), layout.METRICS)
        try:
            from pandas import DataFrame
        except ImportError:
            return rows
        return DataFrame(rows)

    def events(self) -> list[Event]:
        """Returns the starts, failures, checkpoints and ends of all attempts, by time."""
        from trainer.redact import clean
        from trainer.run.events import Event
        from trainer.run.jsonl import read_events

        found = read_events(self._known(), lambda row: Event.from_row(clean(row)))
        return sorted(found, key=lambda event: event.time)

    def checkpoints(self) -> list[CheckpointStatus]:
        """Returns the committed checkpoints by step: ``step``, ``uri`` and ``committed_at``."""
        return list(self.status().checkpoints)

    @property
    def adapter_uri(self) -> str:
        """The folder of the final adapter or, until the last step, that of the newest checkpoint. peft loads both
        from a local folder. Raises InputError if there is none yet."""
        from trainer.checkpoint.protocol import list_commits
        from trainer.checkpoint.publish import is_last
        from trainer.run import layout

        run = self._known()
        newest = next(iter(list_commits(run, newest=1)), None)
        if newest is None:
            raise InputError(f"{run.url} has neither a final adapter nor a complete checkpoint yet: train it first")
        ended = is_last(newest) and run.list(layout.ADAPTER)
        return run.uri(layout.ADAPTER if ended else layout.checkpoint(newest.checkpoint))

    def cancel(self) -> None:
        """Stops the run: its workers commit, and its job is not started again. Raises WorkerFailed if it does not end
        in time."""
        from launcher.submit.cancel import cancel_run

        cancel_run(self.uri, lambda text: print(text, file=sys.stderr))

    def _storage(self) -> Storage:
        return open_storage(self.uri, deadline_s=DEADLINE_S)

    def _known(self) -> Storage:
        """Opens the storage of a run that exists."""
        from trainer.run import layout
        from trainer.run.frozen import no_run

        run = self._storage()
        if run.info(layout.RECIPE) is None:
            raise no_run(run)
        return run
