"""The parts of grpo that need no model: advantages, losses by hand, units, and what a recipe cannot ask for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tasks import task_recipe
from trainer.errors import RecipeError
from trainer.recipe.sections.rollouts.grpo import GRPOSection
from trainer.recipe.sections.rollouts.losses import GRPO_LOSSES
from trainer.recipe.sections.rollouts.reward import RewardSection
from trainer.tasks.grpo.experience import GRPOExperience
from trainer.tasks.grpo.groups import advantages, overlong_penalty
from trainer.tasks.grpo.losses import divergence, importance, log_ratios
from trainer.tasks.rollouts.rollout import Rollout
from trainer.tasks.sampling import SamplingPrompt

LENGTHS = [3, 1, 4]
ADVANTAGES = [0.9, -1.3, 0.4]
LONGEST = 6
LOSSES = GRPO_LOSSES.names()


def test_advantages_by_hand() -> None:
    groups = [np.array([1.0, 0.0, 0.5]), np.array([2.0, 2.0, 2.0])]
    by_group, alike = advantages(groups, "group", leave_one_out=False)
    assert by_group.tolist() == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, 0.0])
    assert alike.tolist() == [0.0, 0.0, 0.0]
    whole = math.sqrt(sum((r - 1.25) ** 2 for r in (1, 0, 0.5, 2, 2, 2)) / 5)
    assert advantages(groups, "batch", leave_one_out=False)[0][0] == pytest.approx(0.5 / (whole + 1e-4))
    assert advantages(groups, "none", leave_one_out=False)[0].tolist() == pytest.approx([0.5, -0.5, 0.0])
    left_out = advantages(groups, "none", leave_one_out=True)[0]
    assert left_out.tolist() == pytest.approx([1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5])


@pytest.mark.parametrize(("tokens", "penalty"), [(1, 0.0), (6, 0.0), (8, 0.5), (10, 1.0)])
def test_a_text_pays_for_its_last_tokens(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, 10, 4) == penalty
    assert overlong_penalty(tokens, 10, 0) == 0.0


def by_hand(loss: str, logps: list[list[float]], old: list[list[float]]) -> float:
    """The loss of an update of three texts, text by text and token by token."""
    low, high = GRPO_LOSSES[loss].clip
    total = 0.0
    for new_T, old_T, advantage in zip(logps, old, ADVANTAGES, strict=True):
        moved = [new - before for new, before in zip(new_T, old_T, strict=True)]
        ratios = [math.exp(m) for m in moved]
        if loss == "gspo":
            ratios = [math.exp(sum(moved) / len(moved))] * len(moved)
        if loss == "rloo":
            ratios = [math.exp(sum(moved))] * len(moved)
        if loss == "cispo":
            tokens = [-min(r, 1 + high) * advantage * p for r, p in zip(ratios, new_T, strict=True)]
        else:
            tokens = [-min(r * advantage, min(max(r, 1 - low), 1 + high) * advantage) for r in ratios]
        if loss in ("grpo", "gspo", "rloo"):
            total += sum(tokens) / len(tokens) / len(LENGTHS)
        elif loss == "dr_grpo":
            total += sum(tokens) / LONGEST / len(LENGTHS)
        else:
            total += sum(tokens) / sum(LENGTHS)
    return total


def section_of(loss: str, **more: Any) -> GRPOSection:
    reward = RewardSection(function="trainer.tasks.ppo.rewards:gsm8k")
    return GRPOSection(loss=loss, reward=reward, max_new_tokens=LONGEST, **more)


def rollout(place: tuple[int, int], tokens: int, score: float, *, ended: bool = True, **rows: Any) -> Rollout:
    prompt = SamplingPrompt(f"s{place[0]}", [1, 2], [3])
    return Rollout(place, prompt, [7] * tokens, ended, "", reward=score, score=score, **rows)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_by_hand(loss: str) -> None:
    generator = torch.Generator().manual_seed(3)
    row = GRPO_LOSSES[loss]
    new, old = (-torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    per_token = torch.tensor(np.repeat(ADVANTAGES, LENGTHS))
    made = GRPO_LOSSES.load(loss)(new, log_ratios(new, old, LENGTHS, row.level), per_token, row.clip)
    weights = torch.tensor(np.repeat([1.0 / n if row.mean == "texts" else 1.0 for n in LENGTHS], LENGTHS))
    experience = GRPOExperience([rollout((0, n), t, float(n)) for n, t in enumerate(LENGTHS)], section_of(loss))
    units = experience.units(np.arange(3))
    split = (
        [[float(v) for v in part] for part in new.split(LENGTHS)],
        [[float(v) for v in p] for p in old.split(LENGTHS)],
    )
    assert float((made.loss * weights).sum()) / units == pytest.approx(by_hand(loss, *split), rel=1e-9)
    assert (made.low | made.high).any()


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cispo"])
def test_a_token_past_its_limit_has_no_gradient(loss: str) -> None:
    row = GRPO_LOSSES[loss]
    logps = torch.tensor([0.0, 0.0, 0.0, 0.0], requires_grad=True)
    old = torch.tensor([-1.0, -1.0, 1.0, 1.0])  # twice more likely than before, twice less
    each = torch.tensor([1.0, -1.0, 1.0, -1.0])
    made = GRPO_LOSSES.load(loss)(logps, log_ratios(logps, old, [1, 1, 1, 1], row.level), each, row.clip)
    made.loss.sum().backward()
    assert (logps.grad != 0).tolist() == [False, True, True, False]
    assert (made.low.tolist(), made.high.tolist()) == ([False] * 3 + [True], [True] + [False] * 3)


def test_the_estimate_of_the_divergence() -> None:
    logps, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
    assert divergence(logps, reference).tolist() == pytest.approx([math.exp(-0.5) - 1 + 0.5, 0.0])


def test_the_weight_of_another_engines_text_is_capped() -> None:
    logps, sampled = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.2, -4.0, -1.0])
    assert importance(logps, sampled, 2.0).tolist() == pytest.approx([math.exp(0.2), 2.0, math.exp(-2.0)])
    assert importance(logps, sampled, None).tolist() == [1.0, 1.0, 1.0]


def test_what_takes_part_in_the_loss() -> None:
    """Two groups: of the first one answer did not end, the second has equal scores."""
    some = [
        rollout((0, 0), 3, 1.0),
        rollout((0, 1), 6, 0.0, ended=False),
        rollout((1, 0), 2, 1.0),
        rollout((1, 1), 1, 1.0),
    ]
    plain = GRPOExperience(some, section_of("dapo"))
    assert plain.learned().tolist() == [0, 1, 2, 3]
    assert plain.moving(plain.learned()).tolist() == [0, 1], "the others have no gradient"
    assert plain.units(plain.learned()) == 12
    assert GRPOExperience(some, section_of("dapo", entropy_coef=0.1)).moving(np.arange(4)).tolist() == [3, 2, 0, 1]
    filtered = GRPOExperience(some, section_of("grpo", overlong_filter=True, dynamic_sampling=2))
    assert filtered.learned().tolist() == [0]
    assert filtered.metrics()["left_out"] == 0.75
    assert filtered.metrics()["groups_alike"] == 0.5
    assert filtered.units(filtered.learned()) == 1
    assert GRPOExperience(some, section_of("dr_grpo")).units(np.arange(4)) == 4 * LONGEST


def test_with_rloo_the_divergence_is_taken_off_the_reward() -> None:
    rows = {"logps": np.array([-1.0, -1.0]), "reference": np.array([-1.5, -2.0])}
    some = [rollout((0, 0), 2, 1.0, **rows), rollout((0, 1), 2, 0.0, logps=np.zeros(2), reference=np.zeros(2))]
    made = GRPOExperience(some, section_of("rloo", kl_coef=0.2))
    assert made.advantages.tolist() == pytest.approx([1.0 - 0.2 * 1.5, -(1.0 - 0.2 * 1.5)])
    assert made.metrics()["kl"] == pytest.approx(1.5 / 4)  # per token
    assert "kl" not in GRPOExperience(some, section_of("rloo")).metrics()


MISTAKES = [
    ({"grpo.reward": {}}, "task grpo needs a reward: grpo.reward.function, grpo.reward.functions or grpo.reward.model"),
    ({"grpo.group_size": 1}, "grpo.group_size"),
    ({"grpo.loss": "grop"}, "did you mean 'grpo'"),
    ({"grpo.minibatches": 19}, "19 minibatches cannot be made of the 18 texts of a step"),
    ({"grpo.overlong_buffer": 6}, "6 is not less than 6"),
    ({"grpo.overlong_buffer": 0}, "has no effect without overlong_buffer"),
    ({"grpo.loss": "cispo", "grpo.clip_low": 0.1}, "has no effect with cispo"),
    ({"adapter": {"method": "none"}, "grpo.kl_coef": 0.1}, "grpo.kl_coef: needs the model with its adapter off"),
    ({"adapter.method": "pissa", "grpo.kl_coef": 0.1}, "which method pissa does not give"),
    ({"model.dtype": "float16"}, "and grpo needs every one; use bfloat16"),
    ({"rollout.max_staleness": 1}, "has no effect with engine transformers"),
    ({"data.packing": True}, "cannot be used with task grpo"),
]


@pytest.mark.parametrize(("change", "said"), MISTAKES)
def test_what_a_recipe_cannot_ask_for(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as found:
        task_recipe("grpo", "mistaken", Path("model"), tmp_path, **change)
    assert said in str(found.value)


def test_settings_of_rollouts_have_no_effect_on_other_tasks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"rollout\.importance_cap: has no effect with task sft"):
        task_recipe("sft", "mistaken", Path("model"), tmp_path, **{"rollout.importance_cap": 3.0})
