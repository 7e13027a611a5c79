"""TensorBoard: event files beside the run, written whole again while they grow, since objects cannot be appended to.

A part begins where the one before is full, or where another driver goes on. TensorBoard reads the parts of a folder in
the order of their names and goes on in a part that has grown. The newest part says how far the curve has come, and a
part is stored whole or not at all, so that nothing is written twice or left out.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.recipe import Recipe, dump
from trainer.redact import redact
from trainer.run import layout
from trainer.storage import Storage, open_storage
from trainer.tracking.base import EVAL, START, TRAIN, Point, TrackedRun, Watermark

_PREFIX = "events.out.tfevents."
_ROLL_BYTES = 512 * 1024
_HEADER_BYTES = 12  # of a record: length (8) and its checksum (4); another checksum (4) stands after the data


class TensorBoard:
    """Of one curve; see `trainer.tracking.base.Tracker`."""

    def __init__(self, curve: TrackedRun) -> None:
        self._folder = folder_of(curve.recipe, curve.run)
        parts = [info.key for info in self._folder.list() if info.key.startswith(_PREFIX)]
        if curve.fresh:
            self._folder.delete(parts)
            parts = []
        self._told = next((mark for key in reversed(parts) if (mark := _last_mark(self._folder.read(key)))), START)
        self._number = 1 + max((int(key.rsplit(".", 1)[1]) for key in parts), default=-1)
        self._id = curve.id
        self._begin()
        if self._told == START:
            self._data += _record(_text_event("recipe", _as_markdown(redact(dump(curve.recipe)))))

    @staticmethod
    def check(recipe: Recipe) -> None:
        return None

    def told(self) -> Watermark:
        return self._told

    def tell(self, points: Sequence[Point]) -> None:
        for point in points:
            if len(self._data) > _ROLL_BYTES:
                self._store()
                self._number += 1
                self._begin()
            self._data += _record(_scalars_event(point))
        self._store()

    def close(self, state: str) -> None:
        return None

    def _begin(self) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._began = int(time.time())
        self._data = bytearray(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))

    def _store(self) -> None:
        name = f"{_PREFIX}{self._began:010d}.{self._id}.{self._number:06d}"
        self._folder.write(name, bytes(self._data))


def folder_of(recipe: Recipe, run: Storage) -> Storage:
    """Where the event files lie: what ``tensorboard --logdir`` is given."""
    folder = recipe.tensorboard.folder
    return run.child(layout.TENSORBOARD) if folder is None else open_storage(folder).child(recipe.name)


def scalars(data: bytes) -> Iterator[tuple[int, str, float]]:
    """(step, tag, value) of every scalar in an event file; a record that was cut off ends it."""
    for event in _events(data):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield event.step, value.tag, value.simple_value


def _scalars_event(point: Point) -> Any:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in point.named().items()]
    return Event(wall_time=point.time, step=point.step, summary=Summary(value=values))


def _text_event(tag: str, text: str) -> Any:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import text as text_summary

    return Event(wall_time=time.time(), summary=text_summary(tag, text))


def _as_markdown(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _record(event: Any) -> bytes:
    """A TFRecord: length, checksum of the length, data, checksum of the data."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))


def _events(data: bytes) -> Iterator[Any]:
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at + _HEADER_BYTES <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        begin, at = at + _HEADER_BYTES, at + _HEADER_BYTES + length + 4
        if at > len(data):
            return
        yield Event.FromString(data[begin : begin + length])


def _last_mark(data: bytes) -> Watermark | None:
    found = [(step, tag.split("/", 1)[0]) for step, tag, _ in scalars(data)]
    return max((Watermark.of(step, part) for step, part in found if part in (TRAIN, EVAL)), default=None)
