"""The reward of a recipe: functions in any of their forms, their names and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.training import small_recipe
from trainer.errors import RecipeError
from trainer.recipe import Recipe, dump, loads
from trainer.recipe.sections.rollouts.reward import RewardFunctionSection, RewardSection
from trainer.recipe.trust import code_of, without_code
from trainer.recipe.writing import may_change

SHIPPED = "trainer.tasks.rewards.shipped"


def recipe_of(folder: Path, reward: dict[str, Any]) -> Recipe:
    changes = {"task": "ppo", "data.packing": False}
    return small_recipe("rewarded", folder, folder, **changes, **{f"ppo.reward.{key}": v for key, v in reward.items()})


def test_all_functions_are_rows(tmp_path: Path) -> None:
    more = ["a.py:short", {"function": "b:long", "weight": -0.5, "timeout_s": 5.0, "name": "penalty"}]
    recipe = recipe_of(tmp_path, {"function": "c.py:right", "functions": more, "model": "runs/x", "model_weight": 2.0})
    reward = recipe.ppo.reward
    assert reward.rows == (
        RewardFunctionSection(function="c.py:right", weight=1.0, timeout_s=60.0),
        RewardFunctionSection(function="a.py:short"),
        RewardFunctionSection(function="b:long", weight=-0.5, timeout_s=5.0, name="penalty"),
    )
    assert reward.weights == {"right": 1.0, "short": 1.0, "penalty": -0.5, "model": 2.0}
    assert loads(dump(recipe)) == recipe


def test_a_recipe_of_before_means_the_same(tmp_path: Path) -> None:
    old = dump(recipe_of(tmp_path, {"function": "trainer.tasks.ppo.rewards:gsm8k"})).splitlines()
    new = ("    functions: []", "    model_weight: 1.0", "    processes: 1")
    assert all(line in old for line in new)
    recipe = loads("\n".join(line for line in old if line not in new))
    assert recipe.ppo.reward == RewardSection(function="trainer.tasks.ppo.rewards:gsm8k")
    assert recipe.ppo.reward.weights == {"gsm8k": 1.0}


def test_processes_and_times_may_change_and_weights_may_not() -> None:
    reward = ("ppo", "reward")
    assert may_change((*reward, "processes"))
    assert may_change((*reward, "functions", 0, "timeout_s"))
    assert not may_change((*reward, "functions", 0, "weight"))
    assert not may_change((*reward, "functions", 0, "function"))


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({}, "task ppo needs a reward: ppo.reward.function, ppo.reward.functions or ppo.reward.model"),
        ({"functions": ["a.py:f", "b.py:f"]}, "two rewards of the name 'f'"),
        ({"function": "a.py:f", "functions": ["b.py:f"]}, "two rewards of the name 'f'"),
        ({"functions": ["a.py:model"], "model": "runs/x"}, "two rewards of the name 'model'"),
        ({"functions": ["no function"]}, "ppo.reward.functions.0.function: .*names no function"),
        ({"functions": [{"weight": 2.0}]}, "ppo.reward.functions.0.function"),
        ({"functions": [{"function": "a.py:f", "name": "a name"}]}, "'a name' names no reward"),
        ({"functions": [{"function": "a.py:f", "timeout_s": 0}]}, "ppo.reward.functions.0.timeout_s"),
        ({"functions": [3]}, "ppo.reward.functions.0"),
        ({"functions": ["a.py:f"], "processes": 0}, "ppo.reward.processes"),
        ({"function": "a.py:f", "model_weight": 0.5}, "model_weight: has no effect without a model"),
        ({"model": "runs/x", "processes": 2}, "processes: has no effect without functions"),
    ],
)
def test_what_is_no_reward_is_refused(tmp_path: Path, reward: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(tmp_path, reward)


def test_functions_are_the_recipes_own_code_but_for_shipped_ones(tmp_path: Path) -> None:
    foreign, tests = "own.py:rate", f"{SHIPPED}:python_tests"
    kept = [f"{SHIPPED}:gsm8k", f"{SHIPPED}:math_answer"]
    recipe = recipe_of(tmp_path, {"function": "other:rate2", "functions": [*kept, foreign, tests]})
    assert code_of(recipe) == [
        "ppo.reward.function other:rate2",
        f"ppo.reward.functions {foreign}",
        f"ppo.reward.functions {tests}",
    ], "python_tests runs code that the stored recipe's data and model choose"
    cleaned = without_code(recipe)
    assert [row.function for row in cleaned.ppo.reward.rows] == kept
    assert code_of(cleaned) == []
    assert without_code(cleaned) == cleaned
