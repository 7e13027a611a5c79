"""Raw inputs beyond JSON Lines and parquet: each row once whatever the cuts, in bounded reads, faults with a place."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer.data.data_support import memory, source, tokenizer, write_rows
from trainer.data import check_first_rows, describe, freeze, prepare_dataset
from trainer.data.readers import hub, open_reader, reader_name, rows_of
from trainer.data.readers.body import ObjectBody, UnpackedBody, unpacked
from trainer.data.readers.csv_rows import Csv
from trainer.data.readers.json_array import JsonArray, open_json
from trainer.data.readers.jsonl import JsonLinesReader
from trainer.data.readers.text import TextDocument, TextLines
from trainer.data.readers.tsv import Tsv
from trainer.data.sample import RowError
from trainer.errors import InputError

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=20)
BOM = "\ufeff"


def body(text, span_bytes=1 << 20):
    raw = text if isinstance(text, bytes) else text.encode()
    storage = memory()
    storage.write("x.data", raw)
    return ObjectBody(storage, "x.data", len(raw), span_bytes)


def read_all(reader):
    return [item for piece in reader.cut() for item in reader.rows(piece.start, piece.stop)]


def rows(reader):
    return [row for _, row in read_all(reader)]


def zstd(raw):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(raw)
    return sink.getvalue().to_pybytes()


@given(
    values=st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.lists(st.floats(allow_nan=False)), max_size=3)),
    indent=st.sampled_from([None, 0, 3]),
    ascii=st.booleans(),
    span_bytes=st.integers(1, 100),
    read_bytes=st.integers(1, 40),
)
@settings(max_examples=80)
def test_an_arrays_elements_come_once_whatever_the_cuts(values, indent, ascii, span_bytes, read_bytes):
    text = "\ufeff \n" * ascii + json.dumps(values, indent=indent, ensure_ascii=ascii) + "\n"
    found = read_all(JsonArray(body(text, span_bytes), read_bytes))
    assert [row for _, row in found] == values
    for offset, row in found:
        assert json.JSONDecoder().raw_decode(text.encode()[offset:].decode())[0] == row


def test_an_array_is_read_a_piece_at_a_time():
    values = [{"t": "é" * 50, "i": i} for i in range(2000)]
    inner = body(json.dumps(values, ensure_ascii=False))
    sizes = []

    class Watched(ObjectBody):
        def read(self, start, stop):
            sizes.append(stop - start)
            return super().read(start, stop)

    watched = Watched(inner._storage, inner._key, inner.size, span_bytes=20_000)
    reader = JsonArray(watched, read_bytes=8192)
    pieces = list(reader.cut())
    assert len(pieces) > 10
    assert max(sizes) <= 2 * 8192
    assert [row for _, row in reader.rows(pieces[3].start, pieces[3].stop)] == [
        v for v in values if v["i"] in {row["i"] for _, row in reader.rows(pieces[3].start, pieces[3].stop)}
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1},\n {"a": 2}\n', "line 3: not valid JSON .*closing ']' is missing"),
        ('[{"a": 1}\n {"a": 2}]', "line 2: not valid JSON .*'{' where"),
        ('[{"a": 1},\n{"a": tru}]', "line 2: not valid JSON"),
        ('[{"a": "x}]', "line 1: not valid JSON .Unterminated"),
        ('[{"a": 1},]', "not valid JSON"),
        (b'[{"a": "\xff\xff"}]', "not UTF-8"),
    ],
)
def test_a_broken_array_is_named_with_its_line(text, says):
    with pytest.raises(InputError, match=f"(?s){says}"):
        rows(JsonArray(body(text, 1), 8))


def test_what_a_json_file_holds_is_seen_by_its_first_character():
    assert rows(open_json(body(BOM + ' [{"a": 1}]'))) == [{"a": 1}]
    assert rows(open_json(body('{"a": 1}\n{"a": 2}\n'))) == [{"a": 1}, {"a": 2}]
    assert rows(open_json(body("[]"))) == []
    ((_, fault), _) = read_all(open_json(body('[3, {"a": 1}]')))
    assert "a JSON int where an object" in fault.reason


@given(
    table=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ending=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    span_bytes=st.integers(1, 60),
)
@settings(max_examples=80)
def test_csv_records_come_once_whatever_the_cuts(table, quoting, ending, bom, span_bytes):
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator=ending).writerows([("a", "b é"), *table])
    text = BOM * bom + out.getvalue()
    found = read_all(Csv(body(text, span_bytes)))
    expected = [{"a": a, "b é": b} for a, b in table]
    assert [row for _, row in found] == expected
    assert len({offset for offset, _ in found}) == len(found)


def test_csv_fields_hold_commas_quotes_and_newlines():
    reader = Csv(body('text,label\n"a, ""b""\nc",1\n\nd,0'))
    assert read_all(reader) == [(11, {"text": 'a, "b"\nc', "label": "1"}), (27, {"text": "d", "label": "0"})]
    assert reader.place(27) == "line 5"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2,3\n", "3 fields where the header has 2"),
        ('a,b\n"x"y,2\n', "not valid CSV"),
        ('a\n"x', "not valid CSV"),
    ],
)
def test_a_bad_record_is_a_fault(text, says):
    (fault,) = rows(Csv(body(text)))
    assert says in fault.reason


def test_tsv_takes_quotes_as_they_stand_and_no_byte_order_mark():
    text = BOM + 'Quality\t#1 String\r\n1\t"Who," he said\r\n0\tsay "no\r\n'
    for span_bytes in (1, 7, 1000):
        assert rows(Tsv(body(text, span_bytes))) == [
            {"Quality": "1", "#1 String": '"Who," he said'},
            {"Quality": "0", "#1 String": 'say "no'},
        ]


@pytest.mark.parametrize(("kind", "comma"), [(Tsv, "\t"), (Csv, ",")])
def test_a_header_in_the_recipe_makes_the_first_line_a_row(kind, comma):
    text = f"good{comma}1\nbad{comma}0\n"
    assert rows(kind(body(text), header=("text", "label"))) == [
        {"text": "good", "label": "1"},
        {"text": "bad", "label": "0"},
    ]
    with pytest.raises(InputError, match=r"'a' twice.*name the columns with header"):
        kind(body(f"a{comma}a\n"))


def test_bytes_that_are_no_text_reach_the_format_as_a_fault(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"prompt\tcompletion\nok\t\xff\n")
    with pytest.raises(InputError, match=r"x\.tsv, line 2: the text cannot be written as UTF-8"):
        prepare_dataset(
            describe(freeze([source(tmp_path / "x.tsv")]), tokenizer(), sequence_length=64), tokenizer(), memory()
        )


def test_text_by_the_line_or_by_the_document():
    text = body(BOM + "one\r\n\n two é\nthree", span_bytes=4)
    assert rows(TextLines(text)) == [{"text": "one"}, {"text": " two é"}, {"text": "three"}]
    assert read_all(TextDocument(text)) == [(0, {"text": "one\r\n\n two é\nthree"})]
    assert rows(TextDocument(body(""))) == []


def test_a_document_that_no_memory_should_hold_is_refused(monkeypatch):
    monkeypatch.setattr("trainer.data.readers.text.DOCUMENT_BYTES", 4)
    with pytest.raises(InputError, match="sample_by: line"):
        TextDocument(body("12345")).cut()


@pytest.mark.parametrize(("codec", "pack"), [("gzip", gzip.compress), ("zstd", zstd)])
def test_compressed_objects_read_as_what_they_hold(codec, pack):
    lines = "".join(json.dumps({"t": "x" * (i % 50)}) + "\n" for i in range(500)).encode()
    twice = pack(lines[:7000]) + pack(lines[7000:])
    inner = UnpackedBody(body(twice), codec, span_bytes=3000)
    reader = JsonLinesReader(inner)
    first = next(iter(reader.cut()))
    assert first == (0, 3000, 3000)
    assert rows(reader) == rows(JsonLinesReader(body(lines, 700)))
    assert inner.clip(1 << 40) == len(lines)
    with pytest.raises(InputError, match=r"x\.data: cannot be unpacked"):
        rows(JsonLinesReader(UnpackedBody(body(twice[:-5]), codec)))


def test_an_unpacked_object_is_kept_until_it_changes(monkeypatch):
    one, other = (body(gzip.compress(text * 100)) for text in (b"a\n", b"b\n"))
    assert unpacked(one, "gzip", "1") is unpacked(one, "gzip", "1")
    assert unpacked(one, "gzip", "2") is not unpacked(one, "gzip", "1")
    monkeypatch.setattr("trainer.data.readers.body.UNPACKED_BYTES", 0)
    kept = unpacked(one, "gzip", "1")
    kept.clip(10)
    unpacked(other, "gzip", "1").clip(10)
    unpacked(other, "gzip", "2")
    assert unpacked(one, "gzip", "1") is not kept
    assert kept.read(0, 2) == b"a\n"


@pytest.mark.parametrize(
    ("name", "write", "more"),
    [
        ("a.jsonl.gz", lambda r: gzip.compress("".join(json.dumps(x) + "\n" for x in r).encode()), {}),
        ("a.json.zst", lambda r: zstd(json.dumps(r).encode()), {}),
        ("a.csv", lambda r: "\n".join(["prompt,completion", *(f"{x['prompt']},{x['completion']}" for x in r)]), {}),
        (
            "a.tsv",
            lambda r: "\n".join(f"{x['prompt']}\t{x['completion']}" for x in r),
            {"header": ["prompt", "completion"]},
        ),
    ],
)
def test_the_same_rows_give_the_same_samples_whatever_file_they_come_in(tmp_path, name, write, more):
    data = [{"prompt": f"Who is {i}?", "completion": "Mira " * (i % 4 + 1)} for i in range(30)]
    raw = write(data)
    (tmp_path / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    plain = write_rows(tmp_path / "plain" / "a.jsonl", data)
    made = [
        prepare_dataset(describe(freeze([s]), tokenizer(), sequence_length=64), tokenizer(), memory())
        for s in (source(tmp_path / name, **more), source(plain))
    ]
    lengths = [sorted(p.index(0).length.tolist()) for p in made]
    assert lengths[0] == lengths[1]
    assert made[0].totals == made[1].totals


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("a.jsonl", {"header": ["x"]}, "header names the columns"),
        ("a.csv", {"sample_by": "document"}, "about text files"),
    ],
)
def test_a_setting_that_means_nothing_to_the_file_is_refused(tmp_path, name, more, says):
    (tmp_path / name).write_text("x")
    spec = describe(freeze([source(tmp_path / name, **more)]), tokenizer(), sequence_length=64)
    with pytest.raises(InputError, match=says):
        check_first_rows(spec, tokenizer())


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://b/x.JSONL", "jsonl"),
        ("a.json.gz", "json"),
        ("a.tab", "tsv"),
        ("a.txt.zst", "text"),
        ("a.b/c.pq", "parquet"),
    ],
)
def test_a_reader_is_chosen_by_the_suffix(url, name):
    assert reader_name(url) == name


def test_a_compressed_file_without_an_inner_suffix_is_named():
    with pytest.raises(InputError, match=r"a compressed file with '' before its suffix"):
        reader_name("s3://b/rows.gz")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("hf://imdb", ("imdb", None, None, "train")),
        ("hf://openai/gsm8k/main", ("openai/gsm8k", "main", None, "train")),
        ("hf://a/b@v1/c/d", ("a/b", "c/d", "v1", "train")),
        ("hf:///data/set/", ("/data/set", None, None, "train")),
        ("hf://a/b@abc/c#test", ("a/b", "c", "abc", "test")),
    ],
)
def test_addresses_of_data_sets(url, address):
    found = hub.parse(url)
    assert found == address
    assert hub.parse(found.url("abc")) == (found if found.is_folder else found._replace(revision="abc"))


@pytest.mark.parametrize("url", ["hf://", "hf://a@b/c", "hf://@main"])
def test_an_address_without_a_data_set_is_refused(url):
    with pytest.raises(InputError, match="names no data set"):
        hub.parse(url)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub._opened.cache_clear()
    return tmp_path


def data_set(folder, count=40, start=0):
    data = [{"question": f"Who is {i}?", "answer": ["Mira", "she"]} for i in range(start, start + count)]
    write_rows(folder / "train.jsonl", data)
    write_rows(folder / "test.jsonl", data[:3])
    return data


def test_a_data_set_of_a_folder_is_read_through_datasets(hub_cache):
    data = data_set(hub_cache / "set")
    train, test = freeze([source(f"hf://{hub_cache}/set", "qa"), source(f"hf://{hub_cache}/set", "qa", split="test")])
    assert [r["question"] for r in rows_of(train)] == [r["question"] for r in data]
    assert [o.size for o in (*train.objects, *test.objects)] == [40, 3]
    reader = open_reader(train, train.objects[0])
    assert list(reader.rows(7, 9)) == [(7, data[7]), (8, data[8])]
    assert reader.place(7) == "row 8"
    spec = describe([train], tokenizer(), sequence_length=64)
    check_first_rows(spec, tokenizer())
    assert prepare_dataset(spec, tokenizer(), memory()).totals.samples == 40


def test_a_data_set_that_changed_is_named(hub_cache):
    data_set(hub_cache / "set")
    spec = describe(freeze([source(f"hf://{hub_cache}/set", "qa")]), tokenizer(), sequence_length=64)
    data_set(hub_cache / "set", count=11)
    with pytest.raises(InputError, match="set#train has changed"):
        prepare_dataset(spec, tokenizer(), memory())


def test_a_data_set_of_the_hub_is_pinned_to_its_commit(hub_cache, monkeypatch):
    import datasets

    data_set(hub_cache / "set")
    real, asked = datasets.load_dataset_builder, []

    def builder_of(path, name=None, revision=None):
        asked.append((path, name, revision))
        builder = real(str(hub_cache / "set"))
        builder.hash = "c0ffee"
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", builder_of)
    (frozen,) = freeze([source("hf://owner/set/main", "qa")])
    assert frozen.objects[0].url == "hf://owner/set@c0ffee/main#train"
    prepared = prepare_dataset(describe([frozen], tokenizer(), sequence_length=64), tokenizer(), memory())
    assert prepared.totals.samples == 40
    assert asked[0] == ("owner/set", "main", None)
    assert set(asked[1:]) == {("owner/set", "main", "c0ffee")}


def test_a_data_set_that_cannot_be_had_is_named(hub_cache):
    with pytest.raises(InputError, match=r"nothing, split train, cannot be loaded.*path of its files|of its files"):
        freeze([source(f"hf://{hub_cache}/nothing", "qa")])
    data_set(hub_cache / "set")
    with pytest.raises(InputError, match="split validation, cannot be loaded"):
        freeze([source(f"hf://{hub_cache}/set", "qa", split="validation")])


def test_every_fault_of_a_source_is_one(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n[2]\n')
    (frozen,) = freeze([source(tmp_path / "x.jsonl")])
    first, second = rows_of(frozen)
    assert first == {"a": 1}
    assert isinstance(second, RowError)
