"""How a run that trains is drawn: text that fits its width."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from trainer.distributed.replica_nodes import placement_text
from trainer.recipe.strategies import Mesh
from trainer.run.best import Patience
from trainer.run.events import (
    ChangeEvent,
    EarlyStopEvent,
    EndEvent,
    Event,
    FailureEvent,
    HangEvent,
    ResizeEvent,
    SkippedCheckpointEvent,
    StaleCheckpointEvent,
    StartEvent,
)

WIDEST_BAR, NARROWEST_BAR = 40, 6
WIDEST_CURVE, NARROWEST_CURVE = 32, 8
GAP = "  "
BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN_HOSTS = 8
LONGEST_VALUE = 60
"""Characters of a setting's value."""


@dataclass(frozen=True)
class AttemptStatus:
    """The state of an attempt. ``saved``: the step of the last checkpoint, if any; ``saved_ago_s``: its age;
    ``losses``: the last ones, oldest first; ``epoch`` counts from 0 here, and from 1, as steps do, in texts. A run that
    is not ``running`` has no speed and no end in sight. ``scores``: of the last evaluation's generated
    answers. None: not known."""

    step: int
    total_steps: int
    loss: float
    tokens_per_s: float
    left_s: float
    workers: int
    saved: int | None
    saved_ago_s: float | None = None
    losses: tuple[float, ...] = ()
    eval_loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    lr: float | None = None
    grad_norm: float | None = None
    mfu: float | None = None
    memory_bytes: int | None = None
    epoch: int = 0
    samples: int = 0
    hosts: tuple[str, ...] = ()
    running: bool = True

    def parts(self) -> dict[str, str]:
        """Name to text, for one line."""
        ago = None if self.saved_ago_s is None else duration(self.saved_ago_s)
        found = {
            "step": f"step {self.step}/{self.total_steps}",
            "loss": f"loss {self.loss:.4f}",
            "eval": _said("eval {:.4f}", self.eval_loss),
            "scores": GAP.join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.scores.items()),
            "lr": _said("lr {:.2e}", self.lr),
            "tokens": _said("{:,.0f} tokens/s", self.tokens_per_s if self.running else None),
            "mfu": _said("MFU {:.0%}", self.mfu if self.running else None),
            "memory": _said("memory {}", self.memory_bytes and size(self.memory_bytes)),
            "eta": _said("ETA {}", duration(self.left_s) if self.running else None),
            "workers": plural(self.workers, "worker"),
            "saved": "not saved yet" if self.saved is None else f"saved {self.saved}{_said(' ({} ago)', ago)}",
        }
        return {name: text for name, text in found.items() if text}


def drawn(standing: AttemptStatus, width: int) -> str:
    """Four lines of at most ``width`` columns: how far it is, what it learns, how fast, and where; the last values of a
    line are left out where they do not fit."""
    s, parts = standing, standing.parts()
    share = f"{s.step / max(1, s.total_steps):.0%}"
    learns = [
        parts["loss"],
        parts.get("eval", ""),
        parts.get("scores", ""),
        parts.get("lr", ""),
        _said("gradient {:.3g}", s.grad_norm),
    ]
    runs = [
        *(parts.get(name, "") for name in ("tokens", "mfu", "memory")),
        f"epoch {s.epoch + 1}, {s.samples:,} samples",
    ]
    where = [parts["saved"], parts["workers"] + (f": {placed(s.hosts)}" if s.hosts else "")]
    learnt = _fitting(learns, width)
    room = min(WIDEST_CURVE, width - len(learnt) - len(GAP))
    course = curve(s.losses, room) if room >= NARROWEST_CURVE else ""
    lines = [
        _with_bar([parts["step"], share, parts.get("eta", "")], s.step / max(1, s.total_steps), width),
        f"{learnt}{GAP}{course}" if course else learnt,
        _fitting(runs, width),
        _fitting(where, width),
    ]
    return "\n".join(line[:width] for line in lines)


def curve(values: Sequence[float], width: int) -> str:
    """One block per column, each the mean of its share of the values; lowest to highest takes the whole height."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2 or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [len(finite) * i // columns for i in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def placed(hosts: Sequence[str]) -> str:
    """``2 on a, 1 on b``; of many hosts the first."""
    counts = Counter(hosts)
    shown = [f"{count} on {host}" for host, count in list(counts.items())[:SHOWN_HOSTS]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {plural(more, 'more host')}" if more else "")


def plural(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def age(seconds: float) -> str:
    """In the largest unit that makes a whole one: ``34 s``, ``5 min``, ``3 h``, ``12 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def event_text(event: Event, before: Sequence[str] | None = None) -> str | None:
    """A line for what a person wants to know as it happens; ``before``: the hosts of the attempt before a start."""
    match event:
        case StartEvent():
            begins = f"continues after step {event.step}" if event.step else _begins(event)
            strategy = str(event.strategy.get("kind") or "")
            told = [f"{_changed(before, event.hosts)}workers {placed(event.hosts)}", strategy, _replicas(event), begins]
            adapted, quantised = event.adapted_share, event.quantised_share
            if adapted and adapted != 1:  # neither of full fine-tuning nor unknown
                told.append(f"{adapted:.0%} of the weights adapted")
                told.append(f"{quantised:.0%} quantised" if quantised else "")
            return f"attempt {event.attempt}: {', '.join(filter(None, told))}"
        case ChangeEvent():
            return f"changed since the attempt before: {changes_text(event)}"
        case FailureEvent():
            return f"failure: {event.cause}" + ("; restarting the workers" if event.retried else "")
        case SkippedCheckpointEvent():
            return f"the checkpoint of step {event.step} is skipped: {event.reason}"
        case StaleCheckpointEvent():
            return f"no checkpoint was committed for {duration(event.age_s or 0)}: the storage is slow or away"
        case EarlyStopEvent():
            return f"ends early at step {event.step}: {early_stop_text(event)}"
    return None


def early_stop_text(event: EarlyStopEvent) -> str:
    """Returns why a run ends before its last step."""
    return str(Patience(event.metric or "", event.value, event.best_step, event.evaluations or 0))


def _begins(event: StartEvent) -> str:
    """Returns where a run begins that has no checkpoint yet."""
    start = event.begins_from
    if not start:
        return "from the first step"
    changed = ", which has changed since the attempt before" if start.get("was") else ""
    return f"from the first step, with {start.get('uri')}{_said(' of step {}', start.get('step'))}{changed}"


def changes_text(event: ChangeEvent) -> str:
    """Returns the settings that differ from the attempt before, on one line."""
    return ", ".join(f"{one.key} {_value(one.before)} → {_value(one.after)}" for one in event.changes)


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _replicas(event: StartEvent) -> str:
    """Returns where the replicas are; empty without any."""
    mesh = event.strategy.get("mesh")
    if not event.replica_nodes or not isinstance(mesh, Mapping):
        return ""
    found = (mesh.get(name) for name in ("replicas", "shards", "context"))
    sizes = [size for size in found if isinstance(size, int) and size > 0]
    if len(sizes) != 3 or math.prod(sizes) != len(event.hosts):
        return ""  # a row that muster did not write
    return placement_text(Mesh(*sizes), event.hosts)


def watched_text(event: Event, before: Sequence[str] | None = None) -> str | None:
    """Returns the status line for a person who does not see the driver's own output."""
    match event:
        case ResizeEvent():
            return f"{event.reason}: the workers start again"
        case HangEvent():
            return f"hang: {event.cause}"
        case EndEvent():
            cause = (event.cause or "").partition("\n")[0]
            return f"{event.state}" + _said(" at step {}", event.step) + _said(": {}", cause or None)
    return event_text(event, before)


def _changed(before: Sequence[str] | None, hosts: Sequence[str]) -> str:
    """Returns what differs between two attempts."""
    if before is None or len(before) == len(hosts):
        return ""
    gone = [host for host in dict.fromkeys(before) if host not in hosts]
    lost = f"{', '.join(gone[:SHOWN_HOSTS])} lost, " if gone else ""
    if len(hosts) < len(before):
        return f"{lost}continues with {len(hosts)} of {len(before)}, "
    return f"{lost}{len(hosts)} in the place of {len(before)}, "


def _fitting(parts: Sequence[str], width: int) -> str:
    line = ""
    for part in filter(None, parts):
        longer = f"{line}{GAP}{part}" if line else part
        if line and len(longer) > width:
            break
        line = longer
    return line


def _with_bar(parts: Sequence[str], share: float, width: int) -> str:
    line = _fitting(parts, width)
    room = min(WIDEST_BAR, width - len(line) - len(GAP))
    if room < NARROWEST_BAR:
        return line
    filled = int(room * min(1.0, share))
    return f"{line}{GAP}{'━' * filled}{'─' * (room - filled)}"


def _said(form: str, value: Any) -> str:
    return form.format(value) if value is not None and value is not False else ""
