"""The arithmetic of PPO against values computed by hand, how tokens are drawn, and what a recipe cannot ask for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.tasks.ppo.advantages import adapted_kl_coef, divergence, explained_variance, gae, token_rewards, whitened
from trainer.tasks.ppo.losses import policy_loss, value_loss
from trainer.tasks.rollouts.rollout import PromptCompletionBatch
from trainer.tasks.sampling import drawn, prompts_of, uniforms


def test_advantages_by_hand() -> None:
    rewards, values = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.25, 0.5])
    # δ = [0 + 0.9·0.25 - 0.5, 0 + 0.9·0.5 - 0.25, 1 - 0.5] = [-0.275, 0.2, 0.5], γλ = 0.45
    wanted = [-0.275 + 0.45 * (0.2 + 0.45 * 0.5), 0.2 + 0.45 * 0.5, 0.5]
    assert gae(rewards, values, 0.9, 0.5) == pytest.approx(wanted)
    assert gae(rewards, values, 1.0, 1.0) == pytest.approx([1 - 0.5, 1 - 0.25, 1 - 0.5]), "return minus value"
    assert gae(rewards, values, 1.0, 0.0) == pytest.approx([-0.25, 0.25, 0.5]), "one step ahead"


def test_a_reward_is_the_score_at_the_last_token_less_the_divergence_at_each() -> None:
    policy, reference = np.log([0.5, 0.2]), np.log([0.25, 0.4])
    kl = divergence(policy, reference, "k1")
    assert kl == pytest.approx([math.log(2), -math.log(2)])
    assert token_rewards(3.0, kl, 0.1) == pytest.approx([-0.1 * math.log(2), 3.0 + 0.1 * math.log(2)])
    assert divergence(policy, reference, "k3") == pytest.approx([0.5 - 1 + math.log(2), 2 - 1 - math.log(2)])


def test_whitening_is_over_all_rows() -> None:
    rows = [np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0])]
    flat = np.concatenate(whitened(rows, centred=True))
    assert (flat.mean(), flat.std()) == pytest.approx((0.0, 1.0))
    kept = np.concatenate(whitened(rows, centred=False))
    assert (kept.mean(), kept.std()) == pytest.approx((3.0, 1.0))
    assert [len(row) for row in whitened(rows, centred=True)] == [2, 3]


def test_the_coefficient_is_steered_by_a_fifth_at_most() -> None:
    assert adapted_kl_coef(0.1, 12.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02)
    assert adapted_kl_coef(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * 1.01)
    assert adapted_kl_coef(0.1, 0.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98)


def test_explained_variance() -> None:
    returns = np.array([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(np.full(3, 2.0), returns) == pytest.approx(0.0)
    assert explained_variance(returns, np.ones(3)) == 0.0


def test_losses_by_hand() -> None:
    old = torch.zeros(4)
    logps = torch.tensor([1.5, 1.5, 0.5, 1.1]).log()
    advantages = torch.tensor([1.0, -1.0, -1.0, 2.0])
    loss, clipped = policy_loss(logps, old, advantages, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, 0.8, -2.2])
    assert clipped.tolist() == [True, False, True, False]
    values, before, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.0])
    assert value_loss(values, before, returns, 0.2).tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 0.1**2])
    assert value_loss(values, before, returns, None).tolist() == pytest.approx([0.5, 0.5 * 0.1**2])


def test_a_token_is_where_the_cumulative_distribution_passes_the_number() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log().repeat(4, 1)
    numbers = torch.tensor([0.0, 0.59, 0.61, 0.95], dtype=torch.float64)
    assert drawn(logits, numbers, 1.0, 1.0).tolist() == [0, 1, 1, 2], "in the order of the vocabulary"
    assert drawn(logits, numbers, 1.0, 0.999).tolist() == [1, 1, 2, 0], "in the order of the probabilities"
    # The set of 0.7 is {1, 2} with 0.9 in all: 2 from 2/3 on.
    assert drawn(logits, numbers, 1.0, 0.7).tolist() == [1, 1, 1, 2]
    assert drawn(logits, torch.tensor([0.6, 0.66, 0.67, 0.999]), 1.0, 0.7).tolist() == [1, 1, 2, 2]
    assert drawn(logits, numbers, 1.0, 0.5).tolist() == [1, 1, 1, 1]
    assert drawn(logits, numbers.clamp(min=0.001), 0.01, 1.0).tolist() == [1, 1, 1, 1], (
        "a low temperature takes the likeliest"
    )


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log().repeat(3000, 1)
    found = drawn(logits, torch.from_numpy(uniforms("any", 3000)), 1.0, 1.0).bincount(minlength=3) / 3000
    assert found.tolist() == pytest.approx([0.1, 0.6, 0.3], abs=0.03)


def test_a_text_has_random_numbers_of_its_own() -> None:
    assert uniforms("17:3:0/1:a", 4).tolist() == uniforms("17:3:0/1:a", 8)[:4].tolist()
    assert uniforms("17:3:0/1:a", 4).tolist() != uniforms("17:4:0/1:a", 4).tolist()


def test_prompts_are_what_stands_before_the_last_answer() -> None:
    class Rows:
        sample_ids = ("one", "two")
        input_ids = np.array([[5, 6, 7, 8, 0, 0], [1, 2, 3, 4, 5, 6]])
        targets = np.array([[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]], np.bool_)

    one, two = prompts_of(Rows())
    assert (one.sample_id, one.tokens, one.answer) == ("one", [5, 6], [7, 8])
    assert (two.tokens, two.answer) == ([1, 2, 3, 4], [5, 6])


def test_rows_are_padded_behind() -> None:
    texts = PromptCompletionBatch.of([([5, 6], [7]), ([8], [9, 10, 11])], 3, ["a", "b"])
    assert texts.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert texts.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert texts.targets.tolist() == [[False, False, True, False], [False, True, True, True]]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"data.packing": True}, "whose packs are prompts; write packing: false"),
    ({"ppo.reward": {}}, "task ppo needs a reward: ppo.reward.function, ppo.reward.functions or ppo.reward.model"),
    ({"ppo.reward.functions": ["x.py:share_of_vowels"]}, "has two rewards of the name 'share_of_vowels'"),
    ({"ppo.reward.model_weight": 0.5}, "has no effect without a model"),
    ({"ppo.reward": {"function": "s3://there/x.py:f"}}, "names no function"),
    ({"ppo.minibatches": 7}, "7 minibatches cannot be made of the 6 texts of a step"),
    ({"ppo.kl_horizon": 5, "ppo.kl_target": None}, "has no effect without kl_target"),
    ({"ppo.kl_coef": 0.0}, "0 cannot be adapted"),
    ({"model.dtype": "float16"}, "use bfloat16"),
    ({"adapter.method": "none"}, "adapter.method none has no adapter"),
    ({"adapter": {"method": "prompt"}}, "separate an adapter's own vectors"),
]


@pytest.mark.parametrize(("change", "said"), MISTAKES)
def test_what_a_recipe_cannot_ask_for(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    from tests.support.tasks import task_recipe
    from trainer.errors import RecipeError

    with pytest.raises(RecipeError) as found:
        task_recipe("ppo", "mistaken", Path("model"), tmp_path, **change)
    assert said in str(found.value)
