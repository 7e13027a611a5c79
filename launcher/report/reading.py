"""Reads from a run's storage what its report shows, and replaces credentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypedDict, TypeVar

from launcher.monitor.compare import Settings, by_loss, settings_of
from launcher.monitor.goodput import Goodput, goodput, newest_driver
from launcher.monitor.status import Status, read_status
from trainer.data.blocks import Counts
from trainer.data.prepare.prepared import PreparedDataset, open_prepared
from trainer.data.run_data import read_data
from trainer.data.summary import Summary, summarise
from trainer.errors import CorruptObject, MusterError
from trainer.parsing import parse_yaml
from trainer.records import Count, read_record
from trainer.redact import Redactor, redactor
from trainer.run import layout
from trainer.run.events import Event, StartEvent
from trainer.run.jsonl import read_events, read_metrics
from trainer.run.metrics import EvalMetrics, Metrics, StepMetrics
from trainer.storage import Storage, open_storage

E = TypeVar("E", bound=Event)

MOST_WINDOWS, SAMPLED_WINDOWS = 256, 64
"""The lengths come from the index of each window; of more than the first number, the second are read, evenly spread."""


@dataclass(frozen=True)
class DataFacts:
    """The prepared data of a run.

    ``parts``: ("train" or "eval", source, counts of its rows). ``summary``: of the training data; ``missing``: why
    there is no summary.
    """

    parts: tuple[tuple[str, str, Counts], ...] = ()
    summary: Summary | None = None
    missing: str = ""


@dataclass(frozen=True)
class RunRecord:
    """One run of a report. ``label`` is unique on the page; ``recipe``: its text, and ``settings`` its values;
    ``rows``: the metrics in the order of attempts."""

    label: str
    status: Status
    recipe: str
    settings: Settings
    provenance: dict[str, Any]
    events: Sequence[Event]
    rows: Sequence[Metrics]
    went: Goodput
    data: DataFacts

    def told(self, *kinds: type[E]) -> list[E]:
        """Returns the events of these kinds, by time."""
        found = [event for event in self.events if isinstance(event, kinds)]
        return sorted(found, key=lambda event: event.time)

    @cached_property
    def starts(self) -> dict[int, int]:
        """The step after which each attempt began, by attempt."""
        found = {event.attempt: event.step or 0 for event in self.told(StartEvent)}
        for row in self.rows:
            found.setdefault(row.attempt, row.step - 1)
        return dict(sorted(found.items()))

    def _lasts(self, row: Metrics) -> bool:
        return all(row.step <= step for attempt, step in self.starts.items() if attempt > row.attempt)

    @cached_property
    def trained(self) -> list[StepMetrics]:
        """All training rows."""
        return [row for row in self.rows if isinstance(row, StepMetrics)]

    @cached_property
    def steps(self) -> list[StepMetrics]:
        """The training rows that no later attempt has repeated."""
        return [row for row in self.trained if self._lasts(row)]

    @cached_property
    def lost(self) -> list[StepMetrics]:
        """The training rows that a later attempt has repeated."""
        return [row for row in self.trained if not self._lasts(row)]

    @cached_property
    def evaluations(self) -> list[EvalMetrics]:
        return [row for row in self.rows if isinstance(row, EvalMetrics) and self._lasts(row)]


def read_runs(uris: Sequence[str], deadline_s: float) -> list[RunRecord]:
    """Reads the runs, best first. Raises InputError if there is no run at one of the URIs."""
    found = [read_run(open_storage(uri, deadline_s=deadline_s)) for uri in uris]
    found = [found[place] for place in by_loss([run.status for run in found])]
    names = [one.label for one in found]
    return [replace(one, label=one.status.uri) if names.count(one.label) > 1 else one for one in found]


def read_run(run: Storage) -> RunRecord:
    redact = redactor()
    status = read_status(run)
    events = read_events(run, lambda row: Event.from_row(redact.clean(row)))
    rows = [row for row in read_metrics(run) if row.attempt]
    running, driver = status.state == "running", newest_driver(run)
    went = goodput(events, rows, until=status.heard_at, running=running, driver=driver)
    try:
        recipe = run.read(layout.RECIPE).decode(errors="replace")
    except FileNotFoundError:
        recipe = ""
    return RunRecord(
        label=redact.text(status.name),
        status=replace(status, uri=redact.text(status.uri), name=redact.text(status.name)),
        recipe=redact.text(recipe),
        settings=redact.clean(settings_of(recipe)),
        provenance=redact.clean(_provenance(run)),
        events=events,
        rows=rows,
        went=went,
        data=_data(run, recipe, redact),
    )


def _provenance(run: Storage) -> dict[str, Any]:
    try:
        found = run.read_json(layout.PROVENANCE)
    except FileNotFoundError:
        return {}
    except CorruptObject as error:
        return {"unreadable": str(error)}
    return found if isinstance(found, dict) else {}


def _data(run: Storage, recipe: str, redact: Redactor) -> DataFacts:
    """Reads the prepared data, which are stored next to the runs and may have been deleted since."""
    parts: list[tuple[str, str, Counts]] = []
    try:
        specs = read_data(run)
        shared = open_storage(run.url.rsplit("/", 1)[0]).child(layout.PREPARED)
        opened = {part: open_prepared(shared, spec.fingerprint) for part, spec in specs.items()}
        for part, prepared in opened.items():
            if prepared:
                counted = zip(prepared.spec.sources, prepared.per_source, strict=True)
                parts += [(part, redact.text(source.path), counts) for source, counts in counted]
        return _summed(opened.get("train"), tuple(parts), recipe)
    except FileNotFoundError:
        return DataFacts(missing="the run has prepared no data yet")
    except (MusterError, OSError, ValueError) as error:
        return DataFacts(tuple(parts), missing=redact.text(f"the prepared data cannot be read: {error}"))


class _Source(TypedDict, total=False):
    weight: float | None


class _Sources(TypedDict, total=False):
    train: list[_Source]


class _Frozen(TypedDict, total=False):
    """The part of a frozen recipe that the lengths need; another version of muster may have written it."""

    seed: Count
    data: _Sources


def _summed(train: PreparedDataset | None, parts: tuple[tuple[str, str, Counts], ...], recipe: str) -> DataFacts:
    if train is None:
        return DataFacts(parts, missing="the prepared data do not exist any more, or are not complete yet")
    frozen = read_record(_Frozen, parse_yaml(recipe) or {})
    weights = [source.get("weight") or 1.0 for source in frozen.get("data", {}).get("train", [])]
    if len(weights) != len(train.spec.sources):
        weights = [1.0] * len(train.spec.sources)
    most = None if train.count <= MOST_WINDOWS else SAMPLED_WINDOWS
    return DataFacts(parts, summarise(train, frozen.get("seed") or 0, weights, most=most))
