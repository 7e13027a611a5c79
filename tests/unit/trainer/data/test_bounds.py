"""Rows of absurd sizes and shapes: a fault of the row, in bounded memory; and files that are nothing of the kind."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.hostile import BYTES, JSON_BOMBS, VALUES, as_json
from tests.unit.trainer.data.data_support import encode_rows, memory, source, tokenizer
from trainer.data import PreparationSpec, describe, freeze
from trainer.data.formats import open_format
from trainer.data.readers import body as bodies
from trainer.data.readers import csv_rows, json_array, lines, parquet
from trainer.data.readers.body import ObjectBody
from trainer.data.readers.csv_rows import Csv
from trainer.data.readers.json_array import JsonArray, open_json
from trainer.data.readers.jsonl import JsonLinesReader
from trainer.data.readers.parquet import Parquet
from trainer.data.readers.text import TextLines
from trainer.data.readers.tsv import Tsv
from trainer.data.sample import ROW_BYTES, RowError, Sample
from trainer.errors import InputError

LIMIT = 4000


class Counted(ObjectBody):
    """Notes the largest piece that was asked for."""

    largest = 0

    def read(self, start: int, stop: int) -> bytes:
        raw = super().read(start, stop)
        self.largest = max(self.largest, len(raw))
        return raw


def body(raw: bytes) -> Counted:
    storage = memory()
    storage.write("x.data", raw)
    return Counted(storage, "x.data", len(raw), span_bytes=1000)


def rows(reader: Any) -> list[Any]:
    return [row for piece in reader.cut() for _, row in reader.rows(piece.start, piece.stop)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (csv_rows, json_array, lines, parquet):
        monkeypatch.setattr(module, "ROW_BYTES", LIMIT)
    monkeypatch.setattr(csv_rows, "_READ_BYTES", 500)
    monkeypatch.setattr(lines, "_LOOK_AHEAD", 500)
    csv_rows.csv.field_size_limit(LIMIT)
    yield
    csv_rows.csv.field_size_limit(ROW_BYTES)


LINES: list[tuple[Callable[[Any], Any], Callable[[str], str], bytes]] = [
    (JsonLinesReader, lambda text: json.dumps({"text": text}), b""),
    (TextLines, lambda text: text, b""),
    (Tsv, lambda text: text, b"text\n"),
    (Csv, lambda text: text, b"text\n"),
    (Csv, lambda text: f'"{text}"', b"text\n"),
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("reader", "line", "head"), LINES)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_line_that_is_too_long_is_a_fault_and_the_others_are_rows(
    reader: Any, line: Any, head: bytes, at: int
) -> None:
    texts = ["a", "b", "c"]
    texts[at] = "x" * 50 * LIMIT
    opened = reader(where := body(head + "\n".join(map(line, texts)).encode() + b"\n"))
    found = [(place, row) for piece in opened.cut() for place, row in opened.rows(piece.start, piece.stop)]
    assert [row["text"] for _, row in found if not isinstance(row, RowError)] == [t for t in texts if len(t) == 1]
    ((place, fault),) = [(place, row) for place, row in found if isinstance(row, RowError)]
    assert f"longer than {ROW_BYTES >> 20} MiB" in fault.reason
    assert opened.place(place) == f"line {at + (2 if head else 1)}"
    assert where.largest <= 3 * LIMIT


@pytest.mark.usefixtures("small")
def test_a_record_of_many_lines_is_bounded_too() -> None:
    """A quote that is never closed would take in all that follows."""
    text = b'text\na\n"' + b"b\n" * 50 * LIMIT + b"c\n"
    found = rows(Csv(body(text)))
    assert found[0] == {"text": "a"}
    assert isinstance(found[1], RowError)
    assert "the record is longer than" in found[1].reason
    assert found[-1] == {"text": "c"}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("reader", [Tsv, Csv])
def test_a_header_that_is_too_long_is_named(reader: Any) -> None:
    with pytest.raises(InputError, match="header, its first"):
        reader(body(b"x" * 50 * LIMIT + b"\na\n"))


@pytest.mark.usefixtures("small")
def test_an_element_that_is_too_long_ends_the_file_at_its_line() -> None:
    """Where the next one begins, only its end would say."""
    text = json.dumps([{"text": "a"}, {"text": "x" * 50 * LIMIT}], indent=0).encode()
    where = body(text)
    with pytest.raises(InputError, match=r"line 5: .*the element that starts there is longer than"):
        rows(JsonArray(where, read_bytes=500))
    assert where.largest <= 2 * LIMIT


def arrow_file(columns: dict[str, Any], **how: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **how)
    return sink.getvalue()


@pytest.mark.usefixtures("small")
def test_a_cell_that_is_too_large_is_a_fault_of_its_row() -> None:
    texts = ["a", "x" * 2 * LIMIT, "c"]
    found = rows(Parquet(body(arrow_file({"text": texts, "n": [1, 2, 3]}))))
    assert [row if isinstance(row, RowError) else row["n"] for row in found] == [1, RowError(parquet.TOO_LONG), 3]


@pytest.mark.usefixtures("small")
def test_of_large_rows_few_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = parquet.plain_rows
    monkeypatch.setattr(parquet, "plain_rows", lambda batch: sizes.append(batch.num_rows) or plain(batch))
    found = rows(Parquet(body(arrow_file({"text": [f"{i}" * 1000 for i in range(10)] * 10}, use_dictionary=False))))
    assert len(found) == 100
    assert max(sizes) <= 4


def test_two_columns_of_one_name_are_named() -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    sink = io.BytesIO()
    pq.write_table(table, sink)
    with pytest.raises(InputError, match="two of its columns are named 'prompt'"):
        Parquet(body(sink.getvalue()))
    for reader in (Csv, Tsv):
        with pytest.raises(InputError, match="has 'prompt' twice"):
            reader(body(b"prompt,prompt\na,b\n" if reader is Csv else b"prompt\tprompt\na\tb\n"))


def test_a_key_that_stands_twice_is_a_fault_of_its_row() -> None:
    twice = '{"prompt": "a", "prompt": "b"}'
    says = "the key 'prompt' appears twice in one object; keep one of them"
    for reader, text in (
        (JsonLinesReader, f'{{"prompt": "c"}}\n{twice}\n'),
        (JsonArray, f'[{{"prompt": "c"}}, {twice}]'),
    ):
        whole, fault = rows(reader(body(text.encode())))
        assert whole == {"prompt": "c"}
        assert says in fault.reason
    inner = rows(JsonLinesReader(body(b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}')))
    assert "'content' appears twice" in inner[0].reason


def test_an_element_that_must_not_be_used_is_a_fault_and_the_next_is_a_row() -> None:
    text = '[{"n": ' + "9" * 5000 + '}, {"n": 1}, {"n": ' + "[" * 200 + "]" * 200 + '}, {"n": 2}]'
    found = rows(JsonArray(body(text.encode()), read_bytes=50))
    assert [isinstance(row, RowError) for row in found] == [True, False, True, False]
    with pytest.raises(InputError, match=r"line 1: .*nested deeper"):
        rows(JsonArray(body(b'[{"n": ' + b"[" * 100_000)))


def test_a_text_of_a_parquet_file_that_is_not_utf_8_is_a_fault() -> None:
    text = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    found = rows(Parquet(body(arrow_file({"text": text, "n": [1, 2, 3]}))))
    assert [row if not isinstance(row, RowError) else row.reason[:29] for row in found] == [
        {"text": "a", "n": 1},
        "its values cannot be read ('u",
        {"text": "c", "n": 3},
    ]


def test_a_date_that_python_does_not_have_is_a_fault() -> None:
    when = pa.array([0, 400_000_000_000_000], pa.timestamp("ms"))
    found = rows(Parquet(body(arrow_file({"when": when}))))
    assert isinstance(found[1], RowError)


READERS: dict[str, Callable[[Any], Any]] = {
    "jsonl": JsonLinesReader, "json": open_json, "csv": Csv, "tsv": Tsv, "text": TextLines, "parquet": Parquet
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
@given(raw=st.binary(max_size=300))
@example(raw=b"")
@example(raw=BYTES["not utf-8"])
@example(raw=BYTES["utf-16"])
@example(raw=b"\xef\xbb\xbf[")
@example(raw=b"PAR1\0\0\0\0PAR1")
@settings(max_examples=150)
def test_any_bytes_are_rows_or_faults(kind: str, raw: bytes) -> None:
    try:
        found = rows(READERS[kind](body(raw)))
    except InputError as error:
        str(error).encode()
        return
    for row in found:
        assert isinstance(row, dict | RowError)
        if isinstance(row, RowError):
            row.reason.encode()
        else:
            "".join(row).encode()


@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
@settings(max_examples=200)
def test_a_damaged_parquet_file_is_rows_faults_or_named(at: int, byte: int) -> None:
    raw = bytearray(arrow_file({"text": ["a", "b"] * 20, "n": list(range(40)), "l": [[1, 2], None] * 20}))
    raw[at % len(raw)] = byte
    try:
        found = rows(Parquet(body(bytes(raw))))
    except InputError:
        return
    assert all(isinstance(row, dict | RowError) for row in found)


@pytest.mark.parametrize("line", [*JSON_BOMBS.values(), *BYTES.values()], ids=[*JSON_BOMBS, *BYTES])
def test_a_line_of_json_out_of_bounds_is_a_fault(line: str | bytes) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    found = rows(JsonLinesReader(body(b'{"a": 1}\n' + raw + b"\n" + b'{"a": 2}\n')))
    assert (found[0], found[-1]) == ({"a": 1}, {"a": 2})
    for row in found[1:-1]:
        assert isinstance(row, RowError)
        row.reason.encode()
        assert len(row.reason) < 300


FORMATS = {
    "completion": {"prompt": "a", "completion": "b"},
    "instruction": {"instruction": "a", "input": "b", "output": "c"},
    "qa": {"question": "a", "answer": ["b"], "aliases": ["c"]},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": []},
    "text": {"text": "a"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
    "classification": {"text": "a", "text_pair": "b", "label": "x"},
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def form_of(name: str) -> Any:
    storage = memory()
    storage.write("a.jsonl", as_json(FORMATS[name]))
    (frozen,) = freeze(
        [source(f"{storage.url}/a.jsonl", name, labels=["x", "y"] if name == "classification" else None)]
    )
    task = {"preference": "dpo", "classification": "classification"}.get(name, "sft")
    spec: PreparationSpec = describe(
        [frozen], tokenizer(), labels=("x", "y"), sequence_length=32, task=task, chat_template=TEMPLATE
    )
    return open_format(frozen, tokenizer(), spec)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=120)
def test_a_row_of_any_values_is_a_sample_or_a_fault(name: str, data: st.DataObject) -> None:
    from tests.support.hostile import changed

    body_of_row = data.draw(changed(FORMATS[name]) | st.dictionaries(st.text(max_size=4), VALUES, max_size=3))
    if not isinstance(body_of_row, dict):
        return
    (found,) = encode_rows(form_of(name), [body_of_row])
    assert isinstance(found, Sample | RowError)
    if isinstance(found, RowError):
        found.reason.encode()


def test_nan_and_infinity_are_no_margin() -> None:
    form = form_of("preference")
    for number in (float("nan"), float("inf")):
        (found,) = form.encode([{**FORMATS["preference"], "margin": number}])
        assert "finite" in found.reason


def test_a_long_line_of_a_packed_file_is_a_fault() -> None:
    """A long line that packs into a few hundred KB is passed over as well."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as out:
        out.write(b'{"text": "a"}\n')
        for _ in range(ROW_BYTES // (1 << 20) + 8):
            out.write(b"x" * (1 << 20))
        out.write(b'\n{"text": "c"}\n')
    opened = JsonLinesReader(bodies.unpacked(body(packed.getvalue()), "gzip", "e"))
    found = rows(opened)
    assert [row if isinstance(row, dict) else row.reason[:11] for row in found] == [
        {"text": "a"},
        "longer than",
        {"text": "c"},
    ]
