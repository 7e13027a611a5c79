from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.quickstart.answers import answers, right
from launcher.quickstart.chart import draw, losses
from launcher.quickstart.corpus import FACTS, NAMES, pretraining_texts, questions, world, write_questions
from launcher.quickstart.model import LlamaShape, pretrain
from launcher.quickstart.prepare import prepare_base

SMALL = LlamaShape(hidden=64, layers=1, heads=2, kv_heads=1, intermediate=64, vocabulary=300)


def test_the_corpus_is_a_function_of_the_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_questions(tmp_path / name / "train", tmp_path / name / "eval", seed=5)
    write_questions(tmp_path / "c" / "train", tmp_path / "c" / "eval", seed=6)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    assert pretraining_texts(5, 20) == pretraining_texts(5, 20)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*.jsonl"))}


def test_questions_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    write_questions(tmp_path / "train", tmp_path / "eval", seed=5)
    files = sorted(tmp_path.rglob("*.jsonl"))
    before = [p.stat().st_mtime_ns for p in files]
    files[0].write_text("torn")
    write_questions(tmp_path / "train", tmp_path / "eval", seed=5)
    assert [p.stat().st_mtime_ns for p in files[1:]] == before[1:]
    assert files[0].read_text() != "torn"


def test_held_out_facts_are_never_asked_about_in_training_but_are_stated_in_pretraining() -> None:
    trained, held_out = questions(5)
    assert not {q.key for q in trained} & {q.key for q in held_out}
    assert len({q.key for q in (*trained, *held_out)}) == len(NAMES) * len(FACTS)
    text = "\n".join(pretraining_texts(5, 6000))
    for question in held_out:
        name, fact = question.key
        statement = FACTS[fact][1][0].format(name=name, value=world(5)[name][fact])
        assert statement == question.completion.strip()
        assert statement in text
    assert "Question" not in text


def test_rows_are_prompt_and_completion(tmp_path: Path) -> None:
    write_questions(tmp_path / "train", tmp_path / "eval", seed=5)
    rows = [json.loads(line) for p in tmp_path.rglob("*.jsonl") for line in p.read_text().splitlines()]
    assert len(rows) == sum(len(part) for part in questions(5))
    assert all(row.keys() == {"prompt", "completion"} for row in rows)
    assert all(row["prompt"].endswith("Answer:") and row["completion"].startswith(" ") for row in rows)


def test_a_base_learns_its_text_and_is_made_once(tmp_path: Path) -> None:
    seen: list[float] = []
    folder = tmp_path / "base"
    assert prepare_base(folder, SMALL, texts=100, steps=12, on_step=lambda step, loss: seen.append(loss))
    assert len(seen) == 12
    assert seen[-1] < seen[0] - 1
    assert not prepare_base(folder, SMALL, on_step=lambda step, loss: pytest.fail("trained again"))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_base_that_was_stopped_half_way_is_made_anew(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        prepare_base(tmp_path / "base", SMALL, texts=50, steps=2, on_step=stop)
    assert not (tmp_path / "base").exists()
    assert prepare_base(tmp_path / "base", SMALL, texts=50, steps=2)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_answers_of_a_trained_model_are_counted_right_and_an_adapter_changes_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    asked = questions(5)[1][:2]
    prepare_base(tmp_path / "base", SMALL, texts=50, steps=1)
    pretrain(tmp_path / "base", [q.prompt + q.completion for q in asked] * 40, steps=60, seed=1, rows=8, lr=1e-2)
    assert right(asked, answers(tmp_path / "base", None, asked)) == 2

    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        # A strong adapter of noise: the model cannot stay what it was.
        LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_alpha=512),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    assert right(asked, answers(tmp_path / "base", tmp_path / "adapter", asked)) == 0


def test_of_a_step_trained_twice_the_newest_attempt_counts() -> None:
    assert losses([(2, 2, 1.0), (1, 1, 3.0), (1, 2, 9.0), (2, 3, None)]) == [(1, 3.0), (2, 1.0)]


def test_a_falling_curve_falls() -> None:
    lines = draw([(step, 10.0 - step) for step in range(1, 9)], width=20, height=8)
    rows = [line[10:] for line in lines[:8]]
    assert lines[0].startswith("    9.00 |*")
    assert lines[7].startswith("    2.00 |")
    assert [row.index("*") for row in rows] == sorted(row.index("*") for row in rows)
    assert lines[-1].split() == ["step", "1", "8"]


@pytest.mark.parametrize(
    ("curve", "stars"), [([], 0), ([(1, 2.0)], 1), ([(1, 2.0), (2, 2.0)], 2), ([(1, float("nan"))], 0)]
)
def test_odd_curves(curve: list[tuple[int, float]], stars: int) -> None:
    assert "".join(draw(curve, width=20)).count("*") == stars


def test_a_long_run_keeps_one_mark_per_column() -> None:
    lines = draw([(step, 1.0 / step) for step in range(1, 5001)], width=40, height=10)
    assert "".join(lines[:10]).count("*") == 40
