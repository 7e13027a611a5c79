"""The rows of `events/`: what happened to a run, one class per kind.

`trainer.run.jsonl.Events` writes them and adds attempt, time and writer. A field is None if its value is not known, or
not written by the version that wrote the row. A row whose fields have other types was not written by muster and raises
Malformed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trainer.parsing import Malformed
from trainer.records import Count, UnixTime
from trainer.run.rows import read_row, row_of

KINDS: dict[str, type[Event]] = {}
"""The class of each kind, by the name in ``event``; `Event.__init_subclass__` adds each class."""

_DRIVER = re.compile(r"driver(\d+)(-|$)")


@dataclass(frozen=True, kw_only=True)
class Event:
    """The fields of every event; an instance of this class itself is an event of an unknown kind.

    ``time``: Unix s, 0 in rows of old versions. ``writer``: ``rank0``, ``driver2``, ``driver2-controller``, …; ``row``:
    the row as it was stored, also with the fields that this version does not know; empty before it is written."""

    kind: ClassVar[str] = ""

    attempt: Count = 0
    time: UnixTime = 0.0
    writer: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind, KINDS[kind] = kind, cls

    @staticmethod
    def from_row(row: Any) -> Event:
        if not isinstance(row, dict) or not isinstance(row.get("event"), str):
            raise Malformed("it names no event")
        # Null counts as missing; only attempt and time were never null.
        present = {name: value for name, value in row.items() if value is not None or name in ("attempt", "time")}
        return read_row(KINDS.get(row["event"], Event), {**present, "row": row})

    def to_row(self) -> dict[str, Any]:
        head = {"attempt": self.attempt, "event": self.kind, "time": self.time, "writer": self.writer}
        return {**head, **{name: value for name, value in row_of(self).items() if name != "row"}}

    @property
    def writing_driver(self) -> int | None:
        """The number of the driver that wrote the event; None if a rank did."""
        match = _DRIVER.match(self.writer or "")
        return int(match[1]) if match else None


@dataclass(frozen=True, kw_only=True)
class StartEvent(Event, kind="start"):
    """Rank 0 writes it when an attempt is built and restored, before its first step. Lists have an entry per rank."""

    step: Count | None
    """The step that was restored; 0 without a checkpoint."""
    total_steps: Count | None = None
    driver: Count | None = None
    hosts: tuple[str, ...] = ()
    replica_nodes: tuple[tuple[str, ...], ...] = ()
    """The hosts of each replica, if there are several of several ranks."""
    pids: tuple[Count, ...] = ()
    devices: tuple[str, ...] = ()
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """The versions of muster, Python and the packages of this attempt."""
    world_size: Count | None = None
    strategy: Mapping[str, Any] = field(default_factory=dict)
    """`trainer.strategies.Strategy.describe`: ``kind``, and what was wrapped."""
    load: Any = None
    """The load of the base model: `trainer.worker.build.Parts.load`."""
    attention: str | None = None
    """The attention kernel."""
    adapted_share: float | None = None
    """Share of the base model's weights that have an adapter or are trained; ``quantised_share``: in 4 or 8 bits."""
    quantised_share: float | None = None
    trainable_parameters: Count | None = None
    models: Mapping[str, Any] = field(default_factory=dict)
    """What identifies each further model that the task uses, by its role: `trainer.tasks.Task.models`."""
    begins_from: Mapping[str, Any] | None = None
    """The trained adapter that the run has begun with: ``uri``, ``folder``, ``step`` (of its run), ``sha256`` of its
    weights, and ``was``, that of the attempt before, if it has changed since."""
    build_s: float | None = None
    restore_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class StartupEvent(Event, kind="startup"):
    """Rank 0 writes it after the first step of an attempt. ``seconds``: by phase (`trainer.run.startup_phases`);
    ``total_s``: their sum."""

    step: Count | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    total_s: float | None


@dataclass(frozen=True, kw_only=True)
class CompiledEvent(Event, kind="compiled"):
    """Rank 0 writes it after a step or an evaluation during which torch.compile compiled. ``seconds`` that this process
    compiled; ``programs``: how many."""

    step: Count | None
    seconds: float | None
    programs: Count | None


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent(Event, kind="checkpoint"):
    """Rank 0 writes it when a checkpoint is committed."""

    step: Count | None
    uri: str | None
    """The checkpoint's folder."""
    stall_s: float | None
    """Seconds for which it stopped the loop; ``snapshot_s`` of them for the copy to host memory."""
    snapshot_s: float | None
    upload_s: float | None
    """Seconds after the snapshot, in the background: writing, hashing, uploading, committing."""
    bytes: Count | None
    coalesced: Count | None
    """Checkpoints that were due since the previous commit and that this one replaced."""


@dataclass(frozen=True, kw_only=True)
class BestEvent(Event, kind="best"):
    """Rank 0 writes it after an evaluation that is the best so far by the recipe's ``checkpoint.keep_best``. Its
    checkpoint follows."""

    step: Count | None
    metric: str | None
    value: float | None


@dataclass(frozen=True, kw_only=True)
class EarlyStopEvent(Event, kind="early_stop"):
    """Rank 0 writes it when the run ends by the recipe's ``training.early_stop``: ``metric`` has not improved since
    ``best_step``, where it was ``value``, in ``evaluations`` evaluations."""

    step: Count | None
    metric: str | None
    value: float | None
    best_step: Count | None
    evaluations: Count | None


@dataclass(frozen=True, kw_only=True)
class SkippedCheckpointEvent(Event, kind="skipped_checkpoint"):
    """Rank 0 writes it when a restore skips a checkpoint that is not complete or is damaged."""

    step: Count | None
    uri: str | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class StaleCheckpointEvent(Event, kind="stale_checkpoint"):
    """Rank 0 writes it once when the newest commit is older than the recipe's ``checkpoint.max_age_s``.
    ``backlog``: snapshots that are not committed yet; ``age_s``: seconds since the newest commit."""

    step: Count | None
    backlog: Count | None
    age_s: float | None


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """A generated text, cut to a length that can be shown. ``sample``: the id of the sample that gave the prompt;
    ``reference``: the data's own answer. ``score``: that of an evaluation's answer. Task ``ppo`` adds the reward, the
    KL divergence from the reference model, and whether the text ended by itself."""

    sample: str | None = None
    prompt: str | None = None
    text: str | None = None
    reference: str | None = None
    score: float | None = None
    reward: float | None = None
    kl: float | None = None
    ended: bool | None = None


@dataclass(frozen=True, kw_only=True)
class TextsEvent(Event, kind="texts"):
    """Rank 0 writes it when the model has generated texts: before the first step and after the last one (``when`` is
    "before" or "after", ``seconds`` what it took), as the first answers of an evaluation (``when`` is "evaluation"), or
    as examples of a step of task ``ppo`` (both are None)."""

    step: Count | None
    when: str | None = None
    seconds: float | None = None
    texts: tuple[SampleText, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProfiledOperator:
    """An operator of a profile. ``ms``: its own milliseconds in ``calls`` calls, without the operators that it
    calls."""

    name: str
    calls: Count
    ms: float


@dataclass(frozen=True, kw_only=True)
class ProfileEvent(Event, kind="profile"):
    """A profiled rank writes it when its trace is stored at ``uri``, or with a ``cause`` when there is none."""

    rank: Count | None
    steps: tuple[Count, ...] = ()
    """The first and the last step in the trace."""
    uri: str | None = None
    bytes: Count | None = None
    operators: tuple[ProfiledOperator, ...] | None = None
    """The operators that took most time."""
    cause: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """The progress of a rank. ``moves`` counts phases entered since the start; ``beat`` counts pulses; ``stack``: the
    main thread's."""

    rank: Count
    host: str
    pid: Count = 0
    step: Count
    phase: str
    moves: Count = 0
    beat: Count = 0
    stack: str = ""

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid}), {self.place}"


@dataclass(frozen=True, kw_only=True)
class HangEvent(Event, kind="hang"):
    """The lowest healthy rank writes it before it ends the ranks that stop the others
    (`trainer.worker.hang_detector`)."""

    cause: str | None
    ranks: tuple[Pulse, ...] = ()
    """The last pulse of each rank that stopped the others."""


@dataclass(frozen=True, kw_only=True)
class BrokenEvent(Event, kind="broken"):
    """Ranks 0 and 1 write it when a collective fails, because a rank that died writes nothing. ``seen``: step and phase
    of each rank, by its number, when it was last seen."""

    seen: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FailureEvent(Event, kind="failure"):
    """The driver writes it for each attempt that failed (under torchrun rank 0, or the rank that failed first), with
    the first cause."""

    cause: str | None
    rank: Count | None
    host: str | None
    phase: str | None
    """The activity of the rank when it failed."""
    trace: str | None
    """The important lines of the stack."""
    advice: str | None
    step: Count | None
    """The last step in the metrics; None under torchrun, or if the storage did not answer."""
    retried: bool | None
    """True if the workers were started again."""
    driver: Count | None = None


@dataclass(frozen=True, kw_only=True)
class SettingChange:
    """A setting whose value differs from that of the attempt before. ``key``: its dotted path in the recipe."""

    key: str
    before: Any = None
    after: Any = None


@dataclass(frozen=True, kw_only=True)
class ChangeEvent(Event, kind="change"):
    """The driver writes it before an attempt with other settings than the attempt before."""

    changes: tuple[SettingChange, ...] = ()
    driver: Count | None


@dataclass(frozen=True, kw_only=True)
class ResizeEvent(Event, kind="resize"):
    """The driver writes it when it asks the workers to commit and end, to start again on other nodes."""

    reason: str | None
    driver: Count | None


@dataclass(frozen=True, kw_only=True)
class EndEvent(Event, kind="end"):
    """Rank 0 writes it at the orderly end of an attempt, with ``step``; the driver when the run failed on the driver's
    own side, with ``cause``. ``state``: succeeded, interrupted or failed."""

    state: str | None
    cause: str | None = None
    step: Count | None = None
    driver: Count | None = None
