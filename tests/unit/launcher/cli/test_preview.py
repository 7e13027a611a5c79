"""`muster preview`: what becomes of rows, for people and as JSON, from a tokenizer alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import small_recipe
from tests.unit.launcher.cli.test_app import Muster
from tests.unit.trainer.data.chat_support import PLAIN, THINKING, byte_tokenizer, chat
from tests.unit.trainer.data.data_support import write_rows
from trainer.recipe import dump

TURNS = [("user", "Who?"), ("assistant", "Mira, é 日本."), ("user", "Where?"), ("assistant", "Ashford.")]
THINKS = [(role, text, {"reasoning_content": "hm"} if role == "assistant" else {}) for role, text in TURNS]


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    return Muster(capsys, monkeypatch)


@pytest.fixture
def write(tiny_model: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe over rows, with a model's folder that has a tokenizer and no weights; returns its path."""

    def recipe(rows: list[Any], template: str = PLAIN, **settings: Any) -> str:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        byte_tokenizer(template=template).save_pretrained(folder)
        shutil.copy(tiny_model / "config.json", folder)
        write_rows(tmp_path / "rows.jsonl", rows)
        source = {"path": str(tmp_path / "rows.jsonl"), "format": "messages"}
        settings = {"data.train": [source], "data.sequence_length": 512, **settings}
        made = small_recipe("shown", folder, tmp_path, **settings)
        (tmp_path / "recipe.yaml").write_text(dump(made))
        return str(tmp_path / "recipe.yaml")

    return recipe


def lines(muster: Muster) -> list[dict[str, Any]]:
    return [json.loads(line) for line in muster.out.splitlines()]


def test_each_sample_is_a_line_whose_spans_make_its_text(muster: Muster, write: Any, tmp_path: Path) -> None:
    path = write([chat(*TURNS), chat(("user", "a")), chat(*TURNS, images=["x"])])
    before = sorted(tmp_path.rglob("*"))
    assert muster("preview", path, "--rows", "0", "--json", "data.max_bad_rows=1") == 0
    first, fault, third = lines(muster)
    assert "".join(span["text"] for span in first["spans"]) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMira, é 日本.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nAshford.<|im_end|>\n"
    )
    targets = [span["text"] for span in first["spans"] if span["target"]]
    assert targets == ["Mira, é 日本.<|im_end|>", "Ashford.<|im_end|>"]
    assert (first["source"], first["index"], first["row"]) == (0, 0, "0:0/0")
    assert first["fault"] is first["dropped"] is None
    assert first["target_tokens"] == len("Mira, é 日本.Ashford.".encode()) + 2
    assert fault["index"] == 1
    assert "no turn of the assistant" in fault["fault"]
    assert fault["spans"] == []
    assert third["warnings"] == ["the column 'images' is not read; only text is trained"]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
    assert "3 rows: 2 samples" in muster.err


def test_a_row_that_becomes_several_samples_has_a_line_for_each(muster: Muster, write: Any) -> None:
    assert muster("preview", write([chat(*THINKS)], THINKING), "--json") == 0
    assert [line["row"] for line in lines(muster)] == ["0:0/0#2", "0:0/0#4"]
    assert [line["index"] for line in lines(muster)] == [0, 0]


def test_more_faults_than_a_run_takes_are_exit_2(muster: Muster, write: Any) -> None:
    assert muster("preview", write([chat(("user", "a")), chat(*TURNS)]), "--json") == 2
    assert len(lines(muster)) == 2, "a bad row does not end it"
    assert "a run stops at more than 0" in muster.err


def test_people_see_targets_between_brackets_and_each_warning_once(muster: Muster, write: Any) -> None:
    rows = [chat(*TURNS, images=["x"])] * 5
    assert muster("preview", write(rows), "--rows", "2") == 0
    assert muster.out.count("⟦Ashford.<|im_end|>⟧") == 2
    assert muster.out.count("warning: the column 'images' is not read") == 1
    assert "2 rows: 2 samples" in muster.err


def test_what_is_cut_or_dropped_is_said(muster: Muster, write: Any) -> None:
    long, apart = chat(("user", "x" * 40), ("assistant", "y")), chat(("user", "a"), ("assistant", "b", {"weight": 0}))
    path = write([chat(*TURNS), long, apart])
    assert muster("preview", path, "--json", "data.sequence_length=24") == 0
    cut, dropped, excluded = lines(muster)
    assert "it is cut after 24 tokens (data.sequence_length)" in cut["warnings"]
    assert "no target is left within 24 tokens" in dropped["dropped"]
    assert "weights" in excluded["dropped"]


def test_held_out_rows_are_not_shown(muster: Muster, write: Any) -> None:
    rows = [chat(("user", f"{i}?"), ("assistant", "yes")) for i in range(40)]
    assert muster("preview", write(rows), "--rows", "0", "--json", "data.eval_fraction=0.5") == 0
    assert 5 < len(lines(muster)) < 35


@pytest.mark.parametrize(("name", "says"), [("chatmll", "did you mean 'chatml'?"), ("none.jinja", "is no file")])
def test_a_template_that_is_not_there_is_named(muster: Muster, write: Any, name: str, says: str) -> None:
    assert muster("preview", write([chat(*TURNS)]), f"data.chat_template={name}") == 2
    assert says in muster.err
    assert muster("preview", write([chat(*TURNS)]), "data.chat_template=chatml") == 0
