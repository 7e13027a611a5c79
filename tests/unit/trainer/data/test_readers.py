"""Raw inputs: whatever the cuts, each row comes once, and its place can be named."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer.data.data_support import memory, source, write_rows
from trainer.data import check_local_sources, freeze
from trainer.data.prepare.split import Span, cut, windows
from trainer.data.readers import open_reader, reader_name
from trainer.data.readers.body import ObjectBody
from trainer.data.readers.jsonl import JsonLinesReader
from trainer.data.readers.parquet import Parquet
from trainer.data.sample import RowError
from trainer.errors import InputError


def read_all(reader):
    return [item for piece in reader.cut() for item in reader.rows(piece.start, piece.stop)]


def json_lines(body, span_bytes=1 << 20):
    storage = memory()
    storage.write("x.jsonl", body)
    return JsonLinesReader(ObjectBody(storage, "x.jsonl", len(body), span_bytes))


@given(
    texts=st.lists(st.one_of(st.just(None), st.text(st.characters(codec="utf-8"), max_size=30)), max_size=12),
    ending=st.sampled_from(["\n", "\r\n"]),
    closed=st.booleans(),
    span_bytes=st.integers(1, 60),
)
@settings(max_examples=60)
def test_each_line_belongs_to_the_span_in_which_it_starts(texts, ending, closed, span_bytes):
    lines = ["" if t is None else json.dumps({"t": t}, ensure_ascii=False) for t in texts]
    body = ending.join(lines) + (ending if closed else "")
    rows = read_all(json_lines(body.encode(), span_bytes))
    assert [row for _, row in rows] == [{"t": t} for t in texts if t is not None]
    for offset, row in rows:
        assert json.loads(body.encode()[offset:].splitlines()[0]) == row


def test_a_line_longer_than_many_spans_is_read_whole():
    long = {"t": "x" * 300_000}
    body = (json.dumps({"t": "a"}) + "\n" + json.dumps(long) + "\n" + json.dumps({"t": "b"})).encode()
    assert [row for _, row in read_all(json_lines(body, 4096))] == [{"t": "a"}, long, {"t": "b"}]


def test_a_byte_order_mark_is_no_part_of_the_first_row():
    assert read_all(json_lines(b'\xef\xbb\xbf{"t": 1}\n')) == [(0, {"t": 1})]


@pytest.mark.parametrize(
    ("line", "says"), [(b'{"t": ', "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[1]", "a JSON list")]
)
def test_a_bad_line_is_a_fault_with_its_line_number(line, says):
    reader = json_lines(b'{"t": 1}\n\n' + line + b'\n{"t": 2}\n', 8)
    (row, fault), *others = [(r, f) for r, f in read_all(reader) if isinstance(f, RowError)]
    assert says in fault.reason
    assert reader.place(row) == "line 3"
    assert not others


def test_a_json_array_is_refused_with_a_way_out():
    with pytest.raises(InputError, match=r"x\.jsonl: starts with '\['.*jq -c"):
        read_all(json_lines(b'[{"t": 1}]'))


@pytest.mark.parametrize("span_bytes", [1 << 30, 2000, 1])
def test_parquet_rows_are_numbered_whatever_the_cuts(span_bytes):
    storage, sink = memory(), pa.BufferOutputStream()
    pq.write_table(pa.table({"t": list(range(3000))}), sink, row_group_size=1300)
    body = sink.getvalue().to_pybytes()
    storage.write("x.parquet", body)
    reader = Parquet(ObjectBody(storage, "x.parquet", len(body)), span_bytes)
    rows = read_all(reader) if span_bytes > 1 else [r for p in reader.cut()[1290:1310] for r in reader.rows(*p[:2])]
    assert rows == [(i, {"t": i}) for i in (range(3000) if span_bytes > 1 else range(1290, 1310))]
    assert reader.place(6) == "row 7"


def test_what_is_no_parquet_is_named():
    storage = memory()
    storage.write("x.parquet", b"PAR1 and no more")
    with pytest.raises(InputError, match=r"x\.parquet: not a readable parquet file"):
        Parquet(ObjectBody(storage, "x.parquet", 16))


def test_a_suffix_without_a_reader_is_named_with_those_that_have_one():
    with pytest.raises(InputError, match=r"'docx'.*\.jsonl.*\.parquet"):
        reader_name("s3://corpus/a.docx")


def test_windows_hold_every_span_once_and_mix_the_sources():
    spans = [Span(s, 0, i, i + 1, 1 << 20) for s in (0, 1) for i in range(128)]
    found = windows(spans, "key")
    assert len(found) == 8
    assert sorted(s for w in found for s in w) == spans
    assert all(0.2 < sum(s.source for s in w) / len(w) < 0.8 for w in found)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert found != windows(spans, "other key")


def test_sources_are_frozen_in_order_and_cut(tmp_path):
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": name}])
    write_rows(tmp_path / "_SUCCESS", [])
    (frozen,) = freeze([source(tmp_path / "*")])
    assert [o.url.rsplit("/", 1)[-1] for o in frozen.objects] == ["a.jsonl", "b.jsonl"]
    assert [(s.object, s.start, s.stop) for s in cut([frozen])] == [(0, 0, 35), (1, 0, 35)]
    assert [row["prompt"] for o in frozen.objects for _, row in read_all(open_reader(frozen, o))] == ["a", "b"]


@pytest.mark.parametrize("path", ["nothing/*.jsonl", "nothing.jsonl", "nothing"])
def test_a_source_without_objects_is_named(tmp_path, path):
    with pytest.raises(InputError, match=f"{path.replace('*', '.')}.*nothing there matches"):
        freeze([source(tmp_path / path)])


def test_a_mistyped_source_is_answered_with_a_name_beside_it(tmp_path):
    write_rows(tmp_path / "chats.jsonl", [])
    with pytest.raises(InputError, match=r"chat\.jsonl: nothing there matches; did you mean 'chats\.jsonl'\?"):
        check_local_sources([source(tmp_path / "chat.jsonl")])
    check_local_sources([source(tmp_path / "chats.jsonl"), source("s3://nobody/looks/there")])
