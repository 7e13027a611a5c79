"""Previews rows with a tokenizer alone: each sample's text with its targets marked, faults and warnings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, NamedTuple

from trainer.data.blocks import part_of_row, sample_id, turn_of_row
from trainer.data.prepare.encode import EncodedRow, RowEncoder
from trainer.data.readers import open_reader
from trainer.data.sample import Row, RowError, Sample, fit
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.data.types import Bools, Tokens

BATCH_ROWS = 64


class TextSpan(NamedTuple):
    """A part of a sample's text. ``target``: its tokens are trained on."""

    text: str
    target: bool


@dataclass
class PreviewedSample:
    """A sample, or a row without one. ``index``: the row's number in its source, from 0. ``row``: the sample's id in
    the ledger. ``place``: where the row stands. ``fault``, ``dropped``: why there is no sample. ``spans``: texts that
    make the decoded sample when they are joined; ``rejected``: the same of a pair's rejected answer."""

    source: int
    index: int
    row: str
    place: str
    fault: str | None = None
    dropped: str | None = None
    warnings: list[str] = field(default_factory=list)
    tokens: int = 0
    target_tokens: int = 0
    label: int | None = None
    spans: list[TextSpan] = field(default_factory=list)
    rejected: list[TextSpan] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {name: getattr(self, name) for name in _ALWAYS}
        data["spans"] = [span._asdict() for span in self.spans]
        if self.label is not None:
            data["label"] = self.label
        return data | ({"rejected": [span._asdict() for span in self.rejected]} if self.rejected else {})


_ALWAYS = ("source", "index", "row", "place", "fault", "dropped", "warnings", "tokens", "target_tokens")


def preview(spec: PreparationSpec, tokenizer: Any, rows: int | None) -> Iterator[PreviewedSample]:
    """Yields what becomes of the first ``rows`` rows of each source, or of all, in order."""
    for number, source in enumerate(spec.sources):
        yield from _Source(number, source, spec, tokenizer).preview(rows)


class _Source:
    def __init__(self, number: int, source: FrozenSource, spec: PreparationSpec, tokenizer: Any) -> None:
        self.number, self.source, self.spec, self.tokenizer = number, source, spec, tokenizer
        self.encoder = RowEncoder(source, tokenizer, spec)

    def preview(self, rows: int | None) -> Iterator[PreviewedSample]:
        read = islice(self._rows(), self.source.limit)
        index = 0
        shown = 0
        while batch := list(islice(read, BATCH_ROWS if rows is None else min(BATCH_ROWS, max(rows - shown, 1)))):
            for position, row in batch:
                obj, at, place = position
                for encoded in self.encoder.encode([(at, row)]):
                    shown += 1
                    yield from self._previewed(encoded, index, obj, place)
                index += 1
                if rows is not None and shown >= rows:
                    return

    def _rows(self) -> Iterator[tuple[tuple[int, int, str], Row | RowError]]:
        """Yields (object, position there, place) and the row, of all rows of the source."""
        for number, frozen in enumerate(self.source.objects):
            reader = open_reader(self.source, frozen)
            for piece in reader.cut():
                for at, row in reader.rows(piece.start, piece.stop):
                    yield (number, at, f"{frozen.url}, {reader.place(at)}"), row

    def _previewed(self, encoded: EncodedRow, index: int, obj: int, place: str) -> Iterator[PreviewedSample]:
        at, samples, warnings = encoded.row, encoded.samples, list(encoded.warnings)
        name = sample_id(self.number, obj, at)
        if isinstance(samples, RowError):
            yield PreviewedSample(self.number, index, name, place, fault=samples.reason, warnings=warnings)
            return
        if not samples:
            reason = "its weights exclude all of the assistant's turns"
            yield PreviewedSample(self.number, index, name, place, dropped=reason, warnings=warnings)
        for sample in samples:
            pieces = fit(sample, self.spec.sequence_length)
            for part, piece in enumerate(pieces or [sample]):
                row = turn_of_row(at, sample.turn) if len(samples) > 1 else part_of_row(at, part)
                shown = PreviewedSample(self.number, index, sample_id(self.number, obj, row), place)
                shown.warnings = [*warnings, *sample.warnings]
                self._fill(shown, piece, kept=bool(pieces))
                yield shown

    def _fill(self, shown: PreviewedSample, sample: Sample, *, kept: bool) -> None:
        length = self.spec.sequence_length
        if not kept:
            shown.dropped = f"no target is left within {length} tokens (data.sequence_length)"
        elif sample.truncated:
            shown.warnings.append(f"it is cut after {length} tokens (data.sequence_length)")
        sides = [side for side in (sample, sample.rejected) if side is not None]
        shown.tokens = sum(len(side.tokens) for side in sides)
        shown.target_tokens = sum(int(side.target[1:].sum()) for side in sides)
        shown.label = sample.label
        shown.spans = text_spans(self.tokenizer, sides[0].tokens, sides[0].target)
        if len(sides) > 1:
            shown.rejected = text_spans(self.tokenizer, sides[1].tokens, sides[1].target)


def text_spans(tokenizer: Any, tokens: Tokens, target: Bools) -> list[TextSpan]:
    """Returns the decoded text, divided where the targets begin and end."""
    spans, at, before = [], 0, ""
    for is_target, group in groupby(target.tolist()):
        at += len(list(group))
        # Decoded from the start: a token alone may be half a character, or lose the space before it.
        text = tokenizer.decode(tokens[:at].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if at < len(tokens):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character, which the next span completes
        spans.append(TextSpan(text[len(before) :], is_target))
        before = text
    return spans
