"""TensorBoard: event files in the run, rewritten while they grow, since objects cannot be appended to.

A new part begins when the last one is full, or when another driver continues the curve. TensorBoard reads the parts of
a folder in the order of their names, and continues in a part that has grown. The newest part contains the curve's last
point, and a part is stored completely or not at all, so no point is written twice or left out.
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
_HEADER_BYTES = 12  # of a record: length (8) and its checksum (4); another checksum (4) follows the data


class TensorBoard:
    """The TensorBoard tracker of one curve; see `trainer.tracking.base.Tracker`."""

    def __init__(self, curve: TrackedRun) -> None:
        self._folder = folder_of(curve.recipe, curve.run)
        parts = [info.key for info in self._folder.list() if info.key.startswith(_PREFIX)]
        if curve.fresh:
            self._folder.delete(parts)
            parts = []
        self._last_mark = next((mark for key in reversed(parts) if (mark := _last_mark(self._folder.read(key)))), START)
        self._number = 1 + max((int(key.rsplit(".", 1)[1]) for key in parts), default=-1)
        self._id = curve.id
        self._begin()
        if self._last_mark == START:
            self._data += _record(_recipe_event(curve.recipe))

    @staticmethod
    def check(recipe: Recipe) -> None:
        return None

    def last_mark(self) -> Watermark:
        return self._last_mark

    def write(self, points: Sequence[Point]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        for point in points:
            if len(self._data) > _ROLL_BYTES:
                self._store()
                self._number += 1
                self._begin()
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in point.named().items()]
            self._data += _record(Event(wall_time=point.time, step=point.step, summary=Summary(value=values)))
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
    """Returns the folder of the event files, for ``tensorboard --logdir``."""
    folder = recipe.tensorboard.folder
    return run.child(layout.TENSORBOARD) if folder is None else open_storage(folder).child(recipe.name)


def scalars(data: bytes) -> Iterator[tuple[int, str, float]]:
    """Yields (step, tag, value) of every scalar in an event file, up to a record that was cut off."""
    for event in _events(data):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield event.step, value.tag, value.simple_value


def _recipe_event(recipe: Recipe) -> Any:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import text as text_summary

    # TensorBoard shows texts as Markdown: an indented text is a code block.
    text = "".join(f"    {line}\n" for line in redact(dump(recipe)).splitlines())
    return Event(wall_time=time.time(), summary=text_summary("recipe", text))


def _record(event: Any) -> bytes:
    """Returns a TFRecord: length, checksum of the length, data, checksum of the data."""
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
