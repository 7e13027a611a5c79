"""Preparing: once, resumable, refusing what changed, naming what is bad."""

from __future__ import annotations

import json
import re

import pytest

from tests.unit.trainer.data.data_support import memory, pairs, source, tokenizer, write_rows
from trainer.data import (
    PreparationSpec,
    check_first_rows,
    describe,
    eval_batches,
    freeze,
    open_prepared,
    prepare_dataset,
    process_pool,
    resolve_chat_template,
    tokenizer_fingerprint,
)
from trainer.data.prepare.partial import BEGUN
from trainer.data.prepare.window import index_key
from trainer.errors import CorruptObject, InputError
from trainer.storage import open_storage

SMALL = {"window_bytes": 1000, "span_bytes": 300}
"""Sizes with which small files make many windows."""


def spec_of(*sources, **settings):
    return describe(freeze(sources), tokenizer(), **{"sequence_length": 64, **settings})


def two_files(folder, rows=40):
    for i in range(2):
        write_rows(folder / f"part-{i}.jsonl", pairs(rows, start=rows * i))
    return source(folder / "*.jsonl")


def ids_of(prepared):
    return [prepared.index(w).sample_id(i) for w in range(len(prepared.windows)) for i in range(len(prepared.index(w)))]


def test_every_row_is_prepared_once_with_its_place(tmp_path):
    spec, seen = spec_of(two_files(tmp_path)), []
    prepared = prepare_dataset(spec, tokenizer(), memory(), on_progress=seen.append, **SMALL)
    assert len(prepared.windows) > 2
    assert prepared.totals.samples == prepared.totals.rows == 80
    assert (seen[-1].windows, seen[-1].samples) == (len(prepared.windows), 80)
    lines = {i: [0] for i in range(2)}
    for i, offsets in lines.items():
        for line in (tmp_path / f"part-{i}.jsonl").read_bytes().splitlines(keepends=True)[:-1]:
            offsets.append(offsets[-1] + len(line))
    assert sorted(ids_of(prepared)) == sorted(f"0:{i}/{at}" for i, offsets in lines.items() for at in offsets)


def test_totals_count_tokens_truncated_and_dropped(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b " * 200},
        {"prompt": "a " * 200, "completion": "b"},
    ]
    prepared = prepare_dataset(spec_of(source(write_rows(tmp_path / "x.jsonl", rows))), tokenizer(), memory())
    totals = prepared.totals
    assert (totals.rows, totals.samples, totals.truncated, totals.dropped) == (3, 2, 1, 1)
    lengths = prepared.index(0).length
    assert totals.tokens == lengths.sum() == 4 + 64
    assert totals.target_tokens == prepared.index(0).targets.sum() == 2 + 62


def test_complete_data_is_opened_without_a_look_at_the_inputs(tmp_path):
    spec, shared = spec_of(two_files(tmp_path)), memory()
    first = prepare_dataset(spec, tokenizer(), shared)
    for file in tmp_path.iterdir():
        file.unlink()
    again = prepare_dataset(spec, None, shared)
    assert again.windows == first.windows
    assert again.spec == first.spec == open_prepared(shared, spec.fingerprint).spec


def test_a_preparation_that_died_goes_on_with_what_is_missing(tmp_path):
    spec, shared = spec_of(two_files(tmp_path)), memory()

    def dying(task, jobs):
        yield task(jobs[0])
        yield task(jobs[1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(spec, tokenizer(), shared, map_windows=dying, **SMALL)
    assert open_prepared(shared, spec.fingerprint) is None
    made = []

    def counting(task, jobs):
        made.extend(jobs)
        return map(task, jobs)

    prepared = prepare_dataset(spec, tokenizer(), shared, map_windows=counting, **SMALL)
    assert [j.window for j in made] == list(range(2, len(prepared.windows)))
    assert prepared.totals.samples == 80


def test_a_preparation_that_died_and_inputs_that_changed_are_not_mixed(tmp_path):
    spec, shared = spec_of(two_files(tmp_path)), memory()

    def dying(task, jobs):
        yield task(jobs[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(spec, tokenizer(), shared, map_windows=dying, **SMALL)
    changed = sorted((tmp_path).rglob("*.jsonl"))[0]
    changed.write_text(changed.read_text().replace("number", "letter"))  # of the same size
    with pytest.raises(InputError, match="has changed"):
        prepare_dataset(spec, tokenizer(), shared, **SMALL)
    now = spec_of(source(tmp_path / "*.jsonl"))
    assert now.fingerprint != spec.fingerprint
    mended, alone = (
        prepare_dataset(now, tokenizer(), shared, **SMALL),
        prepare_dataset(now, tokenizer(), memory(), **SMALL),
    )
    assert [window.sha256 for window in mended.windows] == [window.sha256 for window in alone.windows]


def test_two_that_prepare_at_once_end_with_one_whole(tmp_path):
    spec, shared = spec_of(two_files(tmp_path)), memory()

    def overtaken(task, jobs):
        prepare_dataset(spec, tokenizer(), shared, **SMALL)
        return map(task, jobs)

    prepared = prepare_dataset(spec, tokenizer(), shared, map_windows=overtaken, **SMALL)
    assert prepared.windows == open_prepared(shared, spec.fingerprint).windows
    assert sum(b.tokens for b in eval_batches(prepared, 2, 0, 1)) == prepared.totals.tokens


def test_a_pool_of_processes_makes_the_same(tmp_path):
    spec = spec_of(two_files(tmp_path / "in"))
    here = prepare_dataset(spec, tokenizer(), memory(), **SMALL)
    pool = prepare_dataset(spec, tokenizer(), open_storage(str(tmp_path / "out")), map_windows=process_pool(2), **SMALL)
    assert pool.windows == here.windows


@pytest.mark.parametrize(("change", "says"), [("rewritten", "has changed"), ("gone", "is gone")])
def test_an_input_that_changed_is_named_when_its_data_is_not_complete(tmp_path, change, says):
    spec = spec_of(two_files(tmp_path))
    changed = tmp_path / "part-1.jsonl"
    changed.unlink() if change == "gone" else write_rows(changed, pairs(7))
    with pytest.raises(InputError, match=rf"part-1\.jsonl {says}"):
        prepare_dataset(spec, tokenizer(), memory())


def test_an_input_that_changes_while_it_is_read_is_named(tmp_path):
    spec, shared = spec_of(two_files(tmp_path)), memory()

    def late(task, jobs):
        write_rows(tmp_path / "part-0.jsonl", pairs(3))
        return map(task, jobs)

    with pytest.raises(InputError, match=r"part-0\.jsonl has changed"):
        prepare_dataset(spec, tokenizer(), shared, map_windows=late)
    assert open_prepared(shared, spec.fingerprint) is None
    assert [o.key for o in shared.list()] == [f"{spec.fingerprint}/{BEGUN}"]


def broken_file(tmp_path, bad):
    lines = [json.dumps(r) for r in pairs(30)]
    for i in bad:
        lines[i] = '{"prompt": "x", "comple'
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines))
    return source(path)


def test_a_broken_line_is_named_with_its_file_and_number(tmp_path):
    with pytest.raises(InputError, match=r"broken\.jsonl, line 18: not valid JSON"):
        prepare_dataset(spec_of(broken_file(tmp_path, [17])), tokenizer(), memory())


def test_allowed_bad_rows_are_passed_over_and_reported(tmp_path):
    prepared = prepare_dataset(spec_of(broken_file(tmp_path, [3, 17]), max_bad_rows=2), tokenizer(), memory())
    assert (prepared.totals.rows, prepared.totals.samples, prepared.totals.bad_rows) == (30, 28, 2)
    assert [(b.place, b.url.rsplit("/", 1)[-1]) for b in prepared.bad_rows] == [
        ("line 4", "broken.jsonl"),
        ("line 18", "broken.jsonl"),
    ]


def test_one_bad_row_more_than_allowed_ends_it(tmp_path):
    with pytest.raises(InputError, match=r"line 18.*2 bad rows per source are allowed"):
        prepare_dataset(spec_of(broken_file(tmp_path, [3, 5, 17]), max_bad_rows=2), tokenizer(), memory())


def test_bad_rows_are_counted_over_all_windows(tmp_path):
    spec = spec_of(broken_file(tmp_path, range(0, 30, 6)), max_bad_rows=4)
    with pytest.raises(InputError, match=r"(5 bad rows, and 4 are allowed|4 bad rows per source are allowed)"):
        prepare_dataset(spec, tokenizer(), memory(), **SMALL)


def test_a_source_that_comes_to_nothing_is_an_error(tmp_path):
    empty = source(write_rows(tmp_path / "empty.jsonl", []))
    full = two_files(tmp_path / "full")
    with pytest.raises(InputError, match=r"empty\.jsonl gives no sample: 0 rows read"):
        prepare_dataset(spec_of(full, empty), tokenizer(), memory())


def test_the_first_rows_are_checked_before_anything_is_made(tmp_path):
    check_first_rows(spec_of(two_files(tmp_path)), tokenizer())
    wrong = source(write_rows(tmp_path / "w" / "x.jsonl", [{"question": "a", "answer": "b"}]))
    with pytest.raises(InputError, match=r"x\.jsonl, line 1: the column 'prompt' is missing.*answer, question"):
        check_first_rows(spec_of(wrong), tokenizer())


def test_a_damaged_block_is_read_twice_and_named(tmp_path):
    spec, shared = spec_of(two_files(tmp_path)), memory()
    prepared = prepare_dataset(spec, tokenizer(), shared)
    key = prepared.index(0).meta.data
    body = bytearray(prepared.storage.read(key))
    body[len(body) // 2] ^= 1
    prepared.storage.write(key, bytes(body))
    with pytest.raises(CorruptObject, match=f"{key}: read twice"):
        list(eval_batches(open_prepared(shared, spec.fingerprint), 2, 0, 1))


def test_a_damaged_index_is_named(tmp_path):
    spec, shared = spec_of(two_files(tmp_path)), memory()
    prepare_dataset(spec, tokenizer(), shared).storage.write(index_key(0), b"torn")
    with pytest.raises(CorruptObject, match=re.escape(index_key(0))):
        open_prepared(shared, spec.fingerprint).index(0)


def test_the_fingerprint_follows_what_decides_the_tokens(tmp_path):
    spec = spec_of(two_files(tmp_path))
    assert PreparationSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    others = [spec_of(two_files(tmp_path), **s) for s in ({"sequence_length": 65}, {"chat_template": "{{ x }}"})]
    others.append(spec_of(source(tmp_path / "part-0.jsonl")))
    assert len({s.fingerprint for s in (spec, *others)}) == 4
    assert re.fullmatch("[0-9a-f]{32}", spec.fingerprint)


def test_a_copy_elsewhere_has_another_fingerprint_and_the_same_order(tmp_path):
    one, two = (prepare_dataset(spec_of(two_files(tmp_path / d)), tokenizer(), memory()) for d in ("a", "b"))
    assert one.fingerprint != two.fingerprint
    assert ids_of(one) == ids_of(two)
    assert one.spec.order_key == two.spec.order_key


def test_a_tokenizers_fingerprint_forgets_how_it_was_last_called():
    before = tokenizer_fingerprint(tokenizer())
    tokenizer()(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer()) == before


def test_a_chat_template_is_text_or_a_file(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert (
        resolve_chat_template(str(tmp_path / "t.jinja")) == resolve_chat_template("{{ messages }}") == "{{ messages }}"
    )
    assert resolve_chat_template(None) is None
    with pytest.raises(InputError, match=r"is no file, no Jinja template"):
        resolve_chat_template(str(tmp_path / "missing.jinja"))
