"""Which rows of a source are used: its first ones, those that are held out, and what is said about the others."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from tests.support.training import small_recipe
from tests.unit.trainer.data.chat_support import PLAIN, byte_tokenizer
from tests.unit.trainer.data.data_support import memory, pairs, source, tokenizer, write_rows
from trainer.data import describe, freeze, open_prepared, prepare_dataset
from trainer.data.prepare.encode import RowEncoder
from trainer.data.run_data import prepare_data
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.errors import InputError
from trainer.run import layout


def rows_of(prepared):
    return [prepared.index(w).sample_id(i) for w in range(prepared.count) for i in range(len(prepared.index(w)))]


@pytest.mark.parametrize("limit", [1, 7, 50, 10_000])
def test_a_limit_takes_the_first_rows(tmp_path, limit):
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", pairs(40))
    sources = freeze([source(tmp_path / "*.jsonl", limit=limit)])
    spec = describe(sources, tokenizer(), sequence_length=64)
    prepared = prepare_dataset(spec, tokenizer(), memory(), window_bytes=500, span_bytes=300)
    taken = sorted((int(row.split(":")[1].split("/")[0]), int(row.split("/")[1])) for row in rows_of(prepared))
    whole = prepare_dataset(
        describe(freeze([source(tmp_path / "*.jsonl")]), tokenizer(), sequence_length=64), tokenizer(), memory()
    )
    first = sorted((int(row.split(":")[1].split("/")[0]), int(row.split("/")[1])) for row in rows_of(whole))
    assert taken == first[:limit]


def test_held_out_rows_are_the_same_everywhere_and_never_trained(tiny_model, tmp_path):
    rows = pairs(300)
    write_rows(tmp_path / "data" / "a.jsonl", [*rows, *rows[:20]])
    recipe = small_recipe(
        "held", tiny_model, tmp_path,
        **{"data.train": [{"path": f"{tmp_path}/data/*.jsonl", "format": "completion"}], "data.eval_fraction": 0.2},
    )  # fmt: skip
    data = prepare_data(recipe, memory(), memory(), tokenizer)
    trained, held = set(rows_of(data.train)), set(rows_of(data.eval))
    assert trained.isdisjoint(held)
    assert len(trained) + len(held) == 320
    assert 30 < len(held) < 100
    write_rows(tmp_path / "data" / "a.jsonl", [*rows[150:], *rows[:150]])
    moved = prepare_data(recipe, memory(), memory(), tokenizer)
    assert moved.eval.totals.samples == data.eval.totals.samples - sum(
        row in held for row in rows_of(data.eval) if int(row.split("/")[1]) >= 0 and row in duplicated(data, 300)
    )


def duplicated(data, count):
    """Ids of the rows behind the first ``count``, which are copies of earlier ones."""
    every = sorted([*rows_of(data.train), *rows_of(data.eval)], key=lambda row: int(row.split("/")[1]))
    return set(every[count:])


def encoder(row, format="messages", **settings):
    of_spec = {name: settings.pop(name) for name in ("vocabulary",) if name in settings}
    frozen = FrozenSource("x", format, (), **settings)
    made = RowEncoder(frozen, byte_tokenizer(), PreparationSpec((frozen,), "t", 99, chat_template=PLAIN, **of_spec))
    return made, list(made.encode([(0, row)]))


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_columns_that_carry_meaning_and_are_not_read_are_named_once():
    made, _ = encoder({**CHAT, "images": ["cat.png"], "history": [], "id": 3})
    list(made.encode([(1, {**CHAT, "images": ["dog.png"]})]))
    assert list(made.warnings) == ["the column 'images' is not read; only text is trained"]
    made, _ = encoder({"instruction": "a", "output": "b", "system": "c"}, "instruction")
    assert list(made.warnings) == ["the column 'system' is not read by the format instruction"]
    made, _ = encoder({"instruction": "a", "output": "b", "system": "c"}, "instruction", style="chat")
    assert list(made.warnings) == []


def test_a_null_in_a_template_is_empty_with_a_warning_or_a_fault():
    row, settings = {"q": "Who?", "context": None, "completion": "Mira"}, {"template": "{context}{q}"}
    made, [found] = encoder(row, "completion", **settings)
    assert "None" not in byte_tokenizer().decode(found.samples[0].tokens)
    assert list(made.warnings) == ["the column 'context' of the template is null in some rows, which is an empty text"]
    _, [found] = encoder(row, "completion", nulls="fault", **settings)
    assert found.samples.reason == "the column 'context' of the template is null"


def test_a_token_beyond_the_embeddings_is_a_fault():
    _, [found] = encoder(CHAT, vocabulary=50)
    assert "the model has embeddings of 50 tokens only" in found.samples.reason
    assert "resize_token_embeddings(len(tokenizer)) once, save both" in found.samples.reason


def test_the_warnings_of_all_windows_are_in_the_manifest(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i}?", "completion": "b", "images": ["x"]} for i in range(40)])
    shared, spec = memory(), describe(freeze([source(tmp_path / "a.jsonl")]), tokenizer(), sequence_length=64)
    prepare_dataset(spec, tokenizer(), shared, window_bytes=500, span_bytes=300)
    found = open_prepared(shared, spec.fingerprint)
    assert found.warnings == [["the column 'images' is not read; only text is trained"]]


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), "this is UTF-16 text"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "this is UTF-16 text"),
        ("a.tsv", "prompt\tcompletion\na\tb\n".encode("utf-16"), "this is UTF-16 text"),
        ("a.txt", "one line\nanother\n".encode("utf-16-le"), "this is UTF-16 text"),
        ("a.jsonl", b'{"prompt": "a"}\r{"prompt": "b"}\r', "carriage return (CR) alone"),
        ("a.csv", b"prompt,completion\ra,b\r", "carriage return (CR) alone"),
        ("a.tsv", b"prompt\tcompletion\ra\tb\r", "carriage return (CR) alone"),
    ],
    ids=["jsonl", "csv", "tsv", "txt without a mark", "jsonl, CR", "csv, CR", "tsv, CR"],
)  # fmt: skip
def test_files_of_another_kind_are_named(tmp_path, name, raw, says):
    (tmp_path / name).write_bytes(raw)
    frozen = freeze([source(tmp_path / name, "text" if name.endswith("txt") else "completion")])
    with pytest.raises(InputError) as failed:
        prepare_dataset(describe(frozen, tokenizer(), sequence_length=64), tokenizer(), memory())
    assert says in str(failed.value)
    assert str(tmp_path / name) in str(failed.value)


def test_a_run_of_an_older_version_keeps_its_data_or_says_that_they_are_missing(tiny_model, tmp_path):
    write_rows(tmp_path / "data" / "a.jsonl", pairs(20))
    source_of = {"path": f"{tmp_path}/data/*.jsonl", "format": "completion"}
    recipe = small_recipe("old", tiny_model, tmp_path, **{"data.train": [source_of]})
    run, shared = memory(), memory()
    new = prepare_data(recipe, run, shared, tokenizer).train.spec
    old = replace(new, version=1, stops=())
    assert old.order_key == new.order_key, "the order of the data stays"
    prepared = prepare_dataset(old, tokenizer(), shared)
    run.write(layout.commit(1, 1), b"{}")
    run.write_json(layout.DATA, {"train": old.to_json()})
    assert prepare_data(recipe, run, shared, tokenizer).train.fingerprint == prepared.fingerprint
    with pytest.raises(InputError, match="prepared by an older version of muster, and they are missing"):
        prepare_data(recipe, run, memory(), tokenizer)


def test_only_a_template_that_writes_the_date_has_one_in_its_fingerprint(tiny_model, tmp_path):
    write_rows(tmp_path / "data" / "a.jsonl", [CHAT] * 3)
    source_of = {"path": f"{tmp_path}/data/*.jsonl", "format": "messages"}
    dates = []
    for template in (PLAIN, "{{ strftime_now('%Y') }}" + PLAIN):
        settings = {"data.train": [source_of], "data.chat_template": template}
        recipe = small_recipe("dated", tiny_model, tmp_path, **settings)
        dates.append(prepare_data(recipe, memory(), memory(), tokenizer).train.spec.date)
    assert dates[0] is None
    assert datetime.fromisoformat(dates[1])


def test_a_small_source_may_have_no_row_that_is_held_out(tiny_model, tmp_path):
    for name, count in (("many", 200), ("few", 1)):
        rows = [{"prompt": f"{name} {i}?", "completion": " yes"} for i in range(count)]
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    sources = [{"path": f"{tmp_path}/data/{name}.jsonl", "format": "completion"} for name in ("many", "few")]
    recipe = small_recipe("few", tiny_model, tmp_path, **{"data.train": sources, "data.eval_fraction": 0.05})
    held = prepare_data(recipe, memory(), memory(), tokenizer).eval.per_source
    assert held[0].samples > 0
    assert held[1].samples == 0, "by its hash"
    with pytest.raises(InputError, match="holds out no row; raise it"):
        prepare_data(
            small_recipe("few", tiny_model, tmp_path, **{"data.train": sources[1:], "data.eval_fraction": 0.05}),
            memory(), memory(), tokenizer,
        )  # fmt: skip
