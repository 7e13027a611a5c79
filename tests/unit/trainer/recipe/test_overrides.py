"""KEY=VALUE on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.errors import RecipeError
from trainer.recipe import Recipe, loads

TEXT = """\
name: base
model: {path: models/base}
data:
  train:
    - {path: data/*.jsonl, format: completion}
training: {steps: 10, global_batch: 8, micro_batch: 2}
optimizer: {lr: 1e-4}
storage: runs
"""


def value(recipe: Recipe, path: str) -> Any:
    node: Any = recipe
    for key in path.split("."):
        node = node[int(key)] if key.isdecimal() else node[key] if isinstance(node, dict) else getattr(node, key)
    return node


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=1e-3", 1e-3),
        ("name=123", "123"),
        ("name=true", "true"),
        ("name='quoted'", "quoted"),
        ("model.revision=1e10", "1e10"),
        ("model.revision=0123", "0123"),
        ("training.steps=20", 20),
        ("training.max_grad_norm=null", None),
        ("data.packing=false", False),
        ("data.chat_template=null", None),
        ("data.chat_template={{ messages }} # all", "{{ messages }} # all"),
        ("data.train.0.path=*.jsonl", "*.jsonl"),
        ("data.train.0.path=a=b.jsonl", "a=b.jsonl"),
        ("data.train.0.columns.prompt=7", "7"),
        ("data.train.0.template=Q: {q}", "Q: {q}"),
        ("adapter.target_modules=[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("adapter.target_modules=.*_proj", ".*_proj"),
        ("resources.workers=[2,4]", (2, 4)),
        ("resources.workers=3", 3),
        ("checkpoint.keep_last = 7", 7),
    ],
)
def test_values_are_typed_by_their_field(override: str, expected: Any) -> None:
    path = override.partition("=")[0].strip()
    got = value(loads(TEXT, overrides=[override]), path)
    assert got == expected
    assert type(got) is type(expected)


def test_the_last_one_wins_and_a_whole_section_may_be_set() -> None:
    recipe = loads(TEXT, overrides=["seed=1", "seed=2", "schedule={name: linear, warmup_steps: 3}"])
    assert recipe.seed == 2
    assert (recipe.schedule.name, recipe.schedule.warmup_steps) == ("linear", 3)


def test_an_override_may_mend_the_file() -> None:
    broken = TEXT.replace("1e-4", "fast").replace("name: base", "name: a b")
    recipe = loads(broken, overrides=["optimizer.lr=0.5", "name=ok"])
    assert (recipe.optimizer.lr, recipe.name) == (0.5, "ok")


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("optimizer.lrr=1", "optimizer.lrr", "did you mean 'lr'"),
        ("lr=1", "lr", "it belongs at optimizer.lr"),
        ("steps", "", "is not KEY=VALUE"),
        ("optimizer.lr=fast", "optimizer.lr", "takes a number, got the text 'fast'"),
        ("training.epochs=3", "training.steps", "set the other to null"),
        ("data.train.1.path=x", "data.train.1.path", "has 1 entries"),
        ("seed.0=1", "seed.0", "is not a list"),
        ("model.0=1", "model.0", "is not a list"),
        ("data.train.path=x", "data.train.path", "unknown key"),
        ("=1", "", "unknown key"),
    ],
)
def test_mistakes_are_laid_to_the_command_line(override: str, path: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads(TEXT, "r.yaml", [override])
    [mistake] = caught.value.mistakes
    assert (mistake.where, mistake.path) == ("command line", path)
    assert words in mistake.message


def test_mistakes_of_file_and_command_line_come_together() -> None:
    with pytest.raises(RecipeError) as caught:
        loads(TEXT.replace("1e-4", "fast"), "r.yaml", ["seed=-1", "nam=x"])
    assert [(m.where, m.path) for m in caught.value.mistakes] == [
        ("r.yaml:7", "optimizer.lr"),
        ("command line", "seed"),
        ("command line", "nam"),
    ]
