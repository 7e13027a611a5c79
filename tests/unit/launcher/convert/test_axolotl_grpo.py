"""axolotl's ``rl: grpo``: where each setting comes to, what is reported, and what cannot be a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.launcher.convert.convert_support import AXOLOTL, at, recipe, result

ROWS = [{"path": "org/problems", "type": "chat_template"}]
TRL = {"reward_funcs": ["rewards.right"], "num_generations": 4, "max_completion_length": 128}
SERVED = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}


def settings(trl: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return AXOLOTL | {"rl": "grpo", "trl": {**TRL, **(trl or {})}, "datasets": ROWS, "sample_packing": False, **more}


@pytest.mark.parametrize(
    ("trl", "path", "value"),
    [
        ({}, "task", "grpo"),
        ({}, "data.packing", False),
        ({}, "grpo.group_size", 4),
        ({"num_generations": None}, "grpo.group_size", 8),
        ({}, "grpo.max_new_tokens", 128),
        ({}, "training.global_batch", 2),
        ({}, "grpo.loss", "dapo"),
        ({}, "grpo.clip_high", 0.2),
        ({"loss_type": "bnpo"}, "grpo.loss", "dapo"),
        ({"loss_type": "dr_grpo"}, "grpo.loss", "dr_grpo"),
        ({"loss_type": "dr_grpo"}, "grpo.scale_rewards", "group"),
        ({"scale_rewards": False}, "grpo.scale_rewards", "none"),
        ({"scale_rewards": "batch"}, "grpo.scale_rewards", "batch"),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "grpo.loss", "gspo"),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "grpo.clip_high", 4.0),
        ({"epsilon": 0.1}, "grpo.clip_low", 0.1),
        ({"epsilon": 0.1}, "grpo.clip_high", 0.1),
        ({"epsilon_high": 0.28}, "grpo.clip_high", 0.28),
        ({"beta": 0.04}, "grpo.kl_coef", 0.04),
        ({"num_iterations": 2}, "grpo.epochs", 2),
        ({"temperature": 0.9}, "grpo.temperature", 0.9),
        ({"mask_truncated_completions": True}, "grpo.overlong_filter", True),
        ({}, "grpo.reward.functions.0.function", "rewards.py:right"),
        ({"reward_funcs": ["my.rewards.right"]}, "grpo.reward.functions.0.function", "my.rewards:right"),
        ({"reward_weights": [0.5]}, "grpo.reward.functions.0.weight", 0.5),
        ({"reward_funcs": ["org/rater"], "reward_weights": [2]}, "grpo.reward.model", "org/rater"),
        ({"reward_funcs": ["org/rater"], "reward_weights": [2]}, "grpo.reward.model_weight", 2.0),
        ({}, "rollout.engine", "transformers"),
        (SERVED, "rollout.engine", "vllm"),
        (SERVED, "rollout.addresses", ["http://127.0.0.1:8000"]),
        ({**SERVED, "vllm_server_host": "gpu7", "vllm_server_port": 80}, "rollout.addresses", ["http://gpu7:80"]),
        (SERVED, "rollout.importance_cap", 3.0),
        ({**SERVED, "vllm_importance_sampling_cap": 2}, "rollout.importance_cap", 2.0),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, "rollout.importance_cap", None),
        ({**SERVED, "async_prefetch": True}, "rollout.max_staleness", 1),
        ({**SERVED, "vllm_mode": "colocate"}, "rollout.vllm.gpu_memory_utilization", 0.3),
    ],
)
def test_a_setting_comes_to_its_place(trl: dict[str, Any], path: str, value: Any, tmp_path: Path) -> None:
    assert at(recipe("axolotl", settings(trl), tmp_path), path) == value


def test_rl_beta_and_the_servers_own_settings(tmp_path: Path) -> None:
    vllm = {"gpu_memory_utilization": 0.5, "tensor_parallel_size": 2}
    made = recipe("axolotl", settings({**SERVED, "vllm_mode": "colocate"}, rl_beta=0.1, vllm=vllm), tmp_path)
    assert made.grpo.kl_coef == 0.1
    assert (made.rollout.vllm.gpu_memory_utilization, made.rollout.vllm.tensor_parallel) == (0.5, 2)


@pytest.mark.parametrize(
    ("trl", "more", "key"),
    [
        ({"loss_type": "bnpo"}, {}, "trl.loss_type"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, {}, "trl.loss_type"),
        ({"top_k": 50}, {}, "trl.top_k"),
        ({"sync_ref_model": True}, {}, "trl.sync_ref_model"),
        ({"reward_funcs": ["a/b", "c/d"]}, {}, "trl.reward_funcs"),
        ({"use_vllm": True}, {}, "trl.vllm_importance_sampling_mode"),
        ({"use_vllm": True, "vllm_importance_sampling_cap": 2}, {}, "trl.vllm_importance_sampling_cap"),
        (SERVED, {"adapter": None, "load_in_4bit": False}, "trl.use_vllm"),
        ({"off_policy_mask_threshold": 0.5}, {}, "trl.off_policy_mask_threshold"),
        ({}, {"datasets": [{"path": "org/problems", "type": "rewards.prompts"}]}, "datasets[0].type"),
    ],
)
def test_what_may_change_the_result_is_reported(
    trl: dict[str, Any], more: dict[str, Any], key: str, tmp_path: Path
) -> None:
    draft, _, hindrances = result("axolotl", settings(trl, **more), tmp_path)
    assert not hindrances
    assert key in draft.lost


@pytest.mark.parametrize(
    ("trl", "reason"),
    [
        ({"loss_type": "sapo"}, "sapo is no loss of task grpo"),
        ({"reward_funcs": []}, "a recipe needs a reward"),
        ({"reward_weights": [1, 2]}, "[1, 2] for 1 rewards"),
        ({"rollout_func": "mine.roll"}, "texts by code of one's own"),
    ],
)
def test_what_cannot_be_a_recipe_is_a_hindrance(trl: dict[str, Any], reason: str, tmp_path: Path) -> None:
    _, _, hindrances = result("axolotl", settings(trl), tmp_path)
    assert any(reason in hindrance for hindrance in hindrances)


def test_a_neutral_value_and_settings_of_servers_that_are_not_used_have_no_effect(tmp_path: Path) -> None:
    draft, _, _ = result("axolotl", settings({"top_k": -1, "log_completions": True}, vllm={"port": 1}), tmp_path)
    assert {"trl.top_k", "trl.log_completions", "vllm"} <= set(draft.idle)
    assert not {key for key in draft.lost if key.startswith(("trl", "vllm"))}
