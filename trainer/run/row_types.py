"""Types of the fields of metrics and events rows that readers rely on; further fields are kept as they are.

A row with a field of another type was not written by muster, and is left out by readers. A missing field is no error,
because versions differ in what they write; readers work without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Required, TypedDict

from trainer.parsing import JsonReader, Malformed
from trainer.records import Count, UnixTime, read_record
from trainer.run import layout

Row = dict[str, Any]
Number = float | None
Whole = Count | None


class Facts(TypedDict, total=False):
    """The fields of a step's or an evaluation's row, except its step, attempt and time. A commit record repeats
    them."""

    loss: Number
    eval_loss: Number
    lr: Number
    grad_norm: Number
    mfu: Number
    tokens_per_s: Number
    step_s: Number
    eval_s: Number
    stall_s: Number
    compile_s: Number
    checkpoint_age_s: Number
    total_steps: Whole
    world_size: Whole
    samples: Whole
    epoch: Whole
    memory_bytes: Whole
    memory_rank: Whole
    slowest_rank: Whole
    rank_s: list[float] | None


class MetricsRow(Facts, total=False):
    step: Required[Count]
    attempt: Count
    time: UnixTime


class Event(TypedDict, total=False):
    event: Required[str]
    attempt: Count
    time: UnixTime
    writer: str | None
    driver: Whole
    step: Whole
    rank: Whole
    host: str | None
    cause: str | None
    reason: str | None
    state: str | None
    when: str | None
    retried: bool | None
    world_size: Whole
    total_steps: Whole
    age_s: Number
    build_s: Number
    restore_s: Number
    stall_s: Number
    snapshot_s: Number
    upload_s: Number
    bytes: Whole
    hosts: list[str] | None
    devices: list[str] | None
    versions: Mapping[str, str | None] | None
    strategy: Mapping[str, Any] | None
    seen: Mapping[str, str] | None


class HangRankRow(TypedDict):
    """A rank that blocked the others."""

    rank: Count
    host: str
    step: Count
    phase: str


class Hang(Event):
    ranks: list[HangRankRow] | None


class Startup(Event):
    seconds: Mapping[str, float]


class SampleTextRow(TypedDict, total=False):
    prompt: str | None
    text: str | None
    reference: str | None
    reward: Number


class SampleTextsRow(Event, total=False):
    texts: list[SampleTextRow] | None
    seconds: Number


OWN_FIELDS: Mapping[str, Any] = {"hang": Hang, "startup": Startup, "texts": SampleTextsRow}
"""Kinds of events with fields that other kinds do not have, or have with another type."""


def read_row(reader: JsonReader, key: str, line: bytes) -> Row:
    """Reads one line of the part ``key``. Raises Malformed when it does not have the types of the part's folder."""
    row = reader.read(line)
    if key.startswith(f"{layout.METRICS}/"):
        return dict(read_record(MetricsRow, row))
    if key.startswith(f"{layout.EVENTS}/"):
        head = read_record(Event, row)
        return dict(read_record(OWN_FIELDS.get(head["event"], Event), row))
    if not isinstance(row, dict):
        raise Malformed("it is no object")
    return row
