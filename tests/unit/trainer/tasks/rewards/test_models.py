"""Rewards by a model: on the base that the policy has, or beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.driver.preflight import check_model
from tests.support.looping import bench
from tests.support.models import CPU
from tests.support.rewards import share_of_vowels
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, run_of, train_here
from trainer.artifacts import ArtifactRef
from trainer.artifacts import reward_model as reward_model_file
from trainer.artifacts.reward_model import reward_model
from trainer.errors import InputError
from trainer.evaluate import evaluate
from trainer.recipe import Recipe
from trainer.tasks.rewards.models import ModelRater, SharedReward

FEW = {"training.steps": 3, "checkpoint.every_steps": 3, "training.eval_every": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    for task in ("ppo", "reward", "sft", "classification"):
        write_task_data(folder, task)
    return folder


@pytest.fixture(scope="module")
def reward_run(tiny_model: Path, folder: Path) -> str:
    return trained(task_recipe("reward", "rater", tiny_model, folder, **FEW, **{"optimizer.lr": 1e-2}))


def trained(recipe: Recipe) -> str:
    assert train_here(recipe) == "succeeded"
    return run_of(recipe).url


def asking(uri: str, name: str, model: Path, folder: Path, **changes: Any) -> Recipe:
    return task_recipe("ppo", name, model, folder, **{**FEW, "ppo.reward": {"model": uri}, **changes})


def test_a_run_on_the_same_base_needs_no_second_one(
    tiny_model: Path, folder: Path, reward_run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = asking(reward_run, "shared", tiny_model, folder)
    shared = reward_model(recipe, CPU)
    assert isinstance(shared, SharedReward)
    monkeypatch.setattr(reward_model_file, "_shared", lambda *given: None)
    own = reward_model(recipe, CPU)
    assert isinstance(own, ModelRater)
    with bench(recipe, shared) as b:
        frozen = {n: p.detach().clone() for n, p in b.model.named_parameters() if not p.requires_grad}
        b.run()
        assert all(torch.equal(p, frozen[n]) for n, p in b.model.named_parameters() if n in frozen)
        assert any("lora_A.reward" in name for name in frozen)
        assert b.model.active_adapter == "default"
        task: Any = b.task
        rollouts = task._experience.rollouts
        b.model.eval()
        with torch.no_grad():
            scores = shared.rate(b.model, task._policy, b.model, rollouts, CPU)
            rows = [torch.tensor([[*r.prompt.tokens, *r.tokens]]) for r in rollouts]
            wanted = [float(own.model(input_ids=ids).logits[0, 0]) for ids in rows]
        assert scores == pytest.approx(wanted, abs=1e-5)
        assert len({round(score, 4) for score in scores}) > 1


def test_a_run_trains_and_is_evaluated_with_it(tiny_model: Path, folder: Path, reward_run: str) -> None:
    from safetensors.torch import load

    recipe = asking(reward_run, "trains", tiny_model, folder)
    found = evaluate(recipe, ArtifactRef(run=trained(recipe)))
    assert set(found) >= {"reward", "kl", "loss", "response_length", "ended"}
    assert not [name for name in load(adapter_bytes(recipe)) if "reward" in name]


@pytest.mark.parametrize("change", [{"adapter": {"method": "vera"}}, {"model.quantization": "nf4"}])
def test_where_it_cannot_share_the_base_it_has_its_own(
    tiny_model: Path, folder: Path, reward_run: str, change: dict[str, Any]
) -> None:
    assert isinstance(reward_model(asking(reward_run, "apart", tiny_model, folder, **change), CPU), ModelRater)


def test_a_whole_model_rates_text(tiny_model: Path, folder: Path) -> None:
    whole = {"adapter": {"method": "none"}}
    uri = trained(task_recipe("reward", "whole", tiny_model, folder, **FEW, **whole))
    for place in (uri, f"{uri}/adapter"):
        rater = reward_model(asking(place, "by-whole", tiny_model, folder), CPU)
        assert isinstance(rater, ModelRater)
        one, two, both = (rater(*rows) for rows in (ROWS[0], ROWS[1], [a + b for a, b in zip(*ROWS, strict=True)]))
        assert both == pytest.approx(one + two, abs=1e-5)
        assert rater([], [], []) == []
    recipe = asking(uri, "with-whole", tiny_model, folder)
    with bench(recipe, rater) as b:
        b.run()
        assert [row["reward_std"] > 0 for row in b.rows] == [True] * 3


ROWS: list[Any] = [(["Q1: baker? "], ["the baker sells bread"], [True]), (["Q2: "], ["no"], [False])]


def test_what_rates_is_looked_at_before_workers_start(tiny_model: Path, folder: Path, reward_run: str) -> None:
    odd: list[str] = []
    check_model(asking(reward_run, "looked", tiny_model, folder), odd.append)
    check_model(task_recipe("ppo", "looked", tiny_model, folder), odd.append)
    assert all("joins the end of a prompt" in text for text in odd), "its prompts end with a space"
    missing = task_recipe("ppo", "looked", tiny_model, folder, **{"ppo.reward": {"function": "nowhere.py:rate"}})
    with pytest.raises(InputError, match=r"there is no file nowhere\.py"):
        check_model(missing, odd.append)
    with pytest.raises(InputError):
        check_model(asking(str(folder / "runs" / "nothing"), "looked", tiny_model, folder), odd.append)


def test_what_is_no_reward_model_is_said(tiny_model: Path, folder: Path) -> None:
    for task, said in (("sft", "is for task sft"), ("classification", "has a head with 4 outputs")):
        uri = trained(task_recipe(task, "no-rater", tiny_model, folder, **FEW))
        with pytest.raises(InputError, match=said):
            reward_model(asking(uri, "mistaken", tiny_model, folder), CPU)


def test_another_base_is_another_model(tiny_model: Path, folder: Path, tmp_path: Path, reward_run: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    assert isinstance(reward_model(asking(reward_run, "other", other, folder), CPU), ModelRater)


def test_a_function_needs_no_model(tiny_model: Path, folder: Path) -> None:
    assert reward_model(task_recipe("ppo", "function", tiny_model, folder), CPU) is None
    assert reward_model(task_recipe("sft", "function", tiny_model, folder), CPU) is None


def test_functions_and_a_model_are_added_by_their_weights(tiny_model: Path, folder: Path, reward_run: str) -> None:
    functions = [{"function": "tests.support.rewards:share_of_vowels", "weight": 3.0, "timeout_s": 30.0}]
    both = {"model": reward_run, "model_weight": -0.5, "functions": functions}
    recipe = asking("", "both", tiny_model, folder, **{"ppo.reward": both, "ppo.missing_eos_penalty": 0.0})
    with bench(recipe, reward_model(recipe, CPU)) as b:
        b.run()
        task: Any = b.task
        rollouts = task._experience.rollouts
        b.model.eval()
        with torch.no_grad():
            by_model = task._scoring._model_scores(rollouts, b.model, task._policy, b.model, CPU)
        vowels = share_of_vowels([""] * len(rollouts), [r.words for r in rollouts], [""] * len(rollouts))
        wanted = [3.0 * v - 0.5 * m for v, m in zip(vowels, by_model, strict=True)]
        # The model has been updated since it rated them; its reward adapter and the base have not.
        assert [r.score for r in rollouts] == pytest.approx(wanted, abs=1e-4)
        assert set(rollouts[0].rewards) == {"share_of_vowels", "model"}
        assert len(set(vowels)) > 1
