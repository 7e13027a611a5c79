"""A log in parts of bounded size. Its beginning and its end are kept, and a line reports the bytes left out in between.

The key of a part contains the number of bytes before it, so readers find gaps without a record from the writer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.run import layout
from trainer.storage import Storage, in_parallel

PART_BYTES = 256 * 1024
TAIL_PARTS = 15
"""Parts that stay in addition to the first one: 4 MiB per rank and attempt."""
LONGEST_LINE = 64 * 1024
_PARALLEL_READS = 8


@dataclass
class Part:
    """A part of a log. ``size`` keeps its value when the data of a full and stored part is dropped from memory."""

    offset: int
    data: bytearray = field(default_factory=bytearray)
    size: int = 0
    stored: int = 0


class LogParts:
    """Decides which parts are kept; stores nothing itself. ``before``: (offset, size) of the parts that are stored
    already."""

    def __init__(
        self, before: list[tuple[int, int]], *, part_bytes: int = PART_BYTES, tail_parts: int = TAIL_PARTS
    ) -> None:
        self._part_bytes, self._tail_parts = part_bytes, tail_parts
        self._parts = [Part(0)]
        self._dropped: list[int] = []
        self.move_behind(before)

    def move_behind(self, before: list[tuple[int, int]]) -> None:
        """Moves all parts behind the ones that are stored already, (offset, size) of each. Call it before any of these
        parts is stored."""
        older = [Part(offset, size=size, stored=size) for offset, size in sorted(before)]
        end = older[-1].offset + older[-1].size if older else 0
        for part in self._parts:
            part.offset += end
        self._parts = older + self._parts
        self._drop_middle()

    def add(self, data: bytes) -> None:
        if self._parts[-1].size >= self._part_bytes:
            self._parts.append(Part(self._parts[-1].offset + self._parts[-1].size))
            self._drop_middle()
        part = self._parts[-1]
        part.data += data
        part.size += len(data)

    def dirty(self) -> list[tuple[int, bytes]]:
        """Returns (offset, bytes) of the parts that have grown since they were `stored`."""
        return [(p.offset, bytes(p.data)) for p in self._parts if p.stored < p.size]

    def stored(self, offset: int, size: int) -> None:
        for part in self._parts:
            if part.offset == offset:
                part.stored = size
                if part is not self._parts[-1] and part.stored == part.size:
                    part.data = bytearray()
                return
        if offset not in self._dropped:  # dropped while it was being written
            self._dropped.append(offset)

    def dropped(self) -> list[int]:
        """Returns the offsets of stored parts that have to be deleted, until they are `deleted`."""
        return list(self._dropped)

    def deleted(self, offsets: list[int]) -> None:
        self._dropped = [offset for offset in self._dropped if offset not in offsets]

    def _drop_middle(self) -> None:
        while len(self._parts) > 1 + self._tail_parts:
            old = self._parts.pop(1)
            if old.stored:
                self._dropped.append(old.offset)


class LogLines:
    """Turns one stream into the complete lines that are stored: the last state of a line that was drawn repeatedly,
    passed through ``redact``."""

    def __init__(self, redact: Callable[[bytes], bytes] = bytes) -> None:
        self._redact = redact
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        text = self._rest + data
        end = text.rfind(b"\n") + 1
        if not end and len(text) > LONGEST_LINE:
            end = len(text)
        self._rest = text[end:]
        return self._kept(text[:end])

    def end(self) -> bytes:
        """Returns the last line, which has no line feed."""
        rest, self._rest = self._rest, b""
        return self._kept(rest + b"\n") if rest else b""

    def _kept(self, text: bytes) -> bytes:
        return self._redact(last_states(text))


class Passed:
    """Turns one stream into the bytes that are passed on. Complete lines are passed on at once. An unfinished line
    waits for its rest, or until `rest` is called, so that no credential is cut in two."""

    def __init__(self, redact: Callable[[bytes], bytes]) -> None:
        self._redact = redact
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        text = self._rest + data
        end = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        if not end and len(text) > LONGEST_LINE:
            end = len(text)
        self._rest = text[end:]
        return self._redact(text[:end])

    def rest(self) -> bytes:
        """Returns the bytes that wait, for example a progress bar's newest state."""
        rest, self._rest = self._rest, b""
        return self._redact(rest) if rest else b""


def last_states(text: bytes) -> bytes:
    """Returns each line in its last state, where a progress bar has drawn it repeatedly."""
    return b"".join(map(_last_state, re.findall(rb"[^\n]*\n|[^\n]+", text))) if b"\r" in text else text


def _last_state(line: bytes) -> bytes:
    body = line.rstrip(b"\r\n")
    return body.rpartition(b"\r")[2] + (b"\n" if line.endswith(b"\n") else b"")


class LogPart(NamedTuple):
    """A part in the storage."""

    attempt: int
    rank: int
    offset: int
    size: int

    @property
    def key(self) -> str:
        return layout.log_part(self.attempt, self.rank, self.offset)


def stored_parts(run: Storage) -> list[LogPart]:
    """Returns all stored parts, sorted by attempt, rank and offset."""
    found = ((layout.parse_log_part(info.key), info.size) for info in run.list(layout.LOGS))
    return sorted(LogPart(*place, size) for place, size in found if place)


class LogFeed:
    """Follows one rank's log of one attempt: `new` gives each byte once. Not thread-safe."""

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._at = 0

    def new(self, parts: list[LogPart]) -> bytes:
        """Returns the bytes that were added since the last call. ``parts``: the stored parts of this rank and attempt
        by a new listing."""

        def read(part: LogPart) -> bytes:
            try:
                return self._run.read(part.key)
            except FileNotFoundError:  # deleted since it was listed
                return b""

        wanted = [part for part in parts if part.offset + part.size > self._at]
        return b"".join(self._pieces(wanted, in_parallel(read, wanted, _PARALLEL_READS)))

    def _pieces(self, parts: list[LogPart], bodies: list[bytes]) -> Iterator[bytes]:
        for part, body in zip(parts, bodies, strict=True):
            if not body:  # deleted: the next part's offset shows how much is missing
                continue
            if part.offset > self._at:
                yield f"… {part.offset - self._at:,} bytes are left out here …\n".encode()
                self._at = part.offset
            yield body[self._at - part.offset :]
            self._at = part.offset + len(body)
