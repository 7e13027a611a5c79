"""The PPO task: each iteration generates texts, computes their rewards, and updates the policy.

With q the ratio of a token's probability to its probability when the text was generated, A its advantage
(`advantages`), V the value before it, R = A + V_old its return and H the entropy, the loss of an update is the mean
over the T tokens of its texts:

    1/T Σ max(-A q, -A clip(q, 1 - ε, 1 + ε))
          + value_coef · ½ max((V - R)², (clip(V, V_old - ε_v, V_old + ε_v) - R)²) - entropy_coef · H

Policy and reference are one model, with its adapter switched on and off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch

from trainer.records import read_record
from trainer.tasks.base import GenerationContext, LossOutput, ratio
from trainer.tasks.inputs import to_device
from trainer.tasks.ppo.advantages import adapted_kl_coef
from trainer.tasks.ppo.critic import VALUE_HEAD, add_value_head, first_value
from trainer.tasks.ppo.experience import PPOExperience, PPOMicroBatch
from trainer.tasks.ppo.losses import policy_loss, value_loss
from trainer.tasks.rollouts.policy import PolicyHead
from trainer.tasks.rollouts.rollout import PromptCompletionBatch, Rollout
from trainer.tasks.rollouts.task import RolloutTask

if TYPE_CHECKING:
    from trainer.data import Batch


class _PPOState(TypedDict):
    kl_coef: float


class PPO(RolloutTask):
    extra_module = VALUE_HEAD

    def attach(self, model: Any, generation: GenerationContext | None = None) -> None:
        self._kl_coef = self.recipe.ppo.kl_coef
        super().attach(model, generation)

    def policy_head(self, model: Any) -> PolicyHead:
        section, critic = self.recipe.ppo, add_value_head(model, self.recipe.seed)
        return PolicyHead(model, section.temperature, "ppo", critic=critic, entropy=section.entropy_coef > 0)

    def owns_parameter(self, name: str) -> bool:
        return name.startswith(f"{VALUE_HEAD}.") or super().owns_parameter(name)

    def init_parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        if name.startswith(f"{VALUE_HEAD}."):
            return first_value(name, shape, self.recipe.seed)
        return super().init_parameter(name, shape)

    def experience(self, rollouts: Sequence[Rollout]) -> PPOExperience:
        section = self.recipe.ppo
        made = PPOExperience(rollouts, section, self._kl_coef)
        self._used_kl_coef = self._kl_coef
        if section.kl_target is not None:
            texts = len(made.rollouts)
            self._kl_coef = adapted_kl_coef(self._kl_coef, made.kl, section.kl_target, texts, section.kl_horizon)
        return made

    def loss(self, module: torch.nn.Module, batch: PPOMicroBatch, device: torch.device) -> LossOutput:
        section = self.recipe.ppo
        stats = self._policy.score_tokens(module, batch.texts, device)
        assert stats.values is not None
        old_logps, old_values, advantages, returns = (
            to_device(a, device) for a in (batch.logps, batch.values, batch.advantages, batch.returns)
        )
        of_policy, clipped = policy_loss(stats.logps, old_logps, advantages, section.clip_range)
        of_value = value_loss(stats.values, old_values, returns, section.value_clip_range)
        loss = of_policy + section.value_coef * of_value - section.entropy_coef * stats.entropies
        moved = stats.logps.detach() - old_logps
        return LossOutput(
            loss.sum(),
            {
                "updated_tokens": torch.tensor(len(old_logps), device=device),
                "policy_loss": of_policy.sum().detach(),
                "value_loss": of_value.sum().detach(),
                "entropy": stats.entropies.sum().detach(),
                "clip_fraction": clipped.sum(),
                "approx_kl": (moved.exp() - 1.0 - moved).sum(),
            },
        )

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Returns the metrics of the texts, and means over the tokens of all updates. ``approx_kl``: divergence of the
        policy from the policy that generated the texts (k3)."""
        tokens = max(1.0, float(sums["updated_tokens"]))
        of_updates = {name: float(value) / tokens for name, value in sums.items() if name != "updated_tokens"}
        return {**self._metrics, "kl_coef": self._used_kl_coef, **of_updates}

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self._kl_coef}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._kl_coef = read_record(_PPOState, state)["kl_coef"]

    def eval_loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        """Returns the loss of texts generated for held-out prompts: kl_coef · KL - reward per text, with the recipe's
        ``kl_coef``."""
        rollouts = self.evaluated(module, batch, device, 1)
        self._score_tokens(module, [rollouts], device)
        numbers: dict[str, list[float]] = {
            "reward": [r.score for r in rollouts],
            "kl": [r.kl for r in rollouts],
            "response_length": [r.length for r in rollouts],
            "ended": [r.ended for r in rollouts],
        }
        sums = {name: torch.tensor(float(np.sum(values)), device=device) for name, values in numbers.items()}
        return LossOutput(self.recipe.ppo.kl_coef * sums["kl"] - sums["reward"], sums)

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        names = ("loss", "reward", "kl", "response_length", "ended")
        return {name: ratio(sums, name) for name in names}

    def dummy_micro_batch(self, texts: PromptCompletionBatch) -> PPOMicroBatch:
        nothing = np.zeros(int(texts.targets.sum()), np.float32)
        return PPOMicroBatch(texts, nothing, nothing, nothing, nothing)
