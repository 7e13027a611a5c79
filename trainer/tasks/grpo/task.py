"""The GRPO task: each step writes several answers to each prompt, compares their rewards, and updates the policy.

The loss of an update is that of the recipe's variant (`losses`), weighted for texts of another engine (`importance`),
plus kl_coef · KL to the reference, minus entropy_coef · entropy. The divergence is averaged like the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from trainer.recipe.sections.rollouts.losses import GRPO_LOSSES
from trainer.tasks.base import LossOutput, ratio
from trainer.tasks.grpo.experience import GRPOExperience, GRPOMicroBatch
from trainer.tasks.grpo.groups import overlong_penalty
from trainer.tasks.grpo.losses import divergence, importance, log_ratios, per_token
from trainer.tasks.inputs import to_device
from trainer.tasks.rollouts.rollout import PromptCompletionBatch, Rollout
from trainer.tasks.rollouts.task import RolloutTask
from trainer.tasks.rollouts.writer import by_prompt

if TYPE_CHECKING:
    from trainer.data import Batch
    from trainer.recipe import Recipe


class GRPO(RolloutTask):
    def __init__(self, recipe: Recipe, labels: tuple[str, ...] = ()) -> None:
        super().__init__(recipe, labels)
        self._grpo = section = recipe.grpo
        self.rewrites = section.dynamic_sampling
        self._token_loss = GRPO_LOSSES.load(section.loss)

    def penalty(self, rollout: Rollout) -> float:
        section = self._grpo
        long = overlong_penalty(rollout.length, section.longest, section.overlong_buffer)
        return super().penalty(rollout) + section.overlong_penalty * long

    def experience(self, rollouts: Sequence[Rollout]) -> GRPOExperience:
        return GRPOExperience(rollouts, self._grpo)

    def needs_policy(self) -> bool:
        """With one update in a step, the policy is still the one that the texts are learned for."""
        section = self._grpo
        return section.epochs * section.minibatches > 1 or (section.row.kl_in_reward and section.kl_coef > 0.0)

    def needs_reference(self) -> bool:
        return self._grpo.kl_coef > 0.0

    def loss(self, module: torch.nn.Module, batch: GRPOMicroBatch, device: torch.device) -> LossOutput:
        section, row = self._grpo, self._grpo.row
        stats = self._policy.score_tokens(module, batch.texts, device)
        logps, advantages = stats.logps, to_device(batch.advantages, device)
        old_logps = to_device(batch.logps, device) if len(batch.logps) else logps.detach()
        ratios = log_ratios(logps, old_logps, batch.lengths, row.level)
        of_policy = self._token_loss(logps, ratios, advantages, section.clip)
        loss, tokens = of_policy.loss, logps.new_tensor(len(advantages))
        sums = {
            "updated_tokens": tokens,
            "policy_loss": of_policy.loss.sum().detach(),
            "entropy": stats.entropies.sum().detach(),
            "clip_fraction_low": of_policy.low.sum(),
            "clip_fraction_high": of_policy.high.sum(),
            "approx_kl": divergence(logps.detach(), old_logps).sum(),
        }
        if self._writer is not None and not self._writer.engine.reproducible:
            sampled = to_device(batch.sampled, device)
            weights = importance(old_logps, sampled, self.recipe.rollout.importance_cap)
            loss = loss * weights
            sums |= {
                "logp_mismatch": (old_logps - sampled).abs().sum(),
                "importance_weight": weights.sum(),
            }
        if section.kl_coef and not row.kl_in_reward:
            # With the ratio its gradient is the one of the divergence of what the policy writes now, without a bias
            # (DeepSeek-V3.2, arXiv:2512.02556, 3.1).
            kl = ratios.exp() * divergence(logps, to_device(batch.reference, device))
            loss = loss + section.kl_coef * kl
            sums["kl"] = kl.sum().detach()
        if section.entropy_coef:
            loss = loss - section.entropy_coef * stats.entropies
        if row.mean == "texts":
            lengths = torch.tensor(batch.lengths, dtype=loss.dtype, device=device)
            loss = loss / per_token(lengths, batch.lengths)
        return LossOutput(loss.sum(), sums)

    def step_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Returns the metrics of the texts, and means over the tokens of all updates. ``approx_kl``: divergence of the
        policy from what it was before the step (k3). ``logp_mismatch``: mean absolute difference of log-probabilities
        from those of the servers."""
        tokens = float(sums["updated_tokens"])
        # No text had an advantage: nothing was computed, and nothing is known of these.
        names = [name for name in sums if name != "updated_tokens"] if tokens else []
        return {**self._metrics, **{name: float(sums[name]) / tokens for name in names}}

    def eval_loss(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        """Returns the negative reward of texts written for held-out prompts. All sums are means of a prompt's answers,
        which are ``grpo.eval_answers``."""
        answers = self._grpo.eval_answers
        rollouts = self.evaluated(module, batch, device, answers)
        passed = [r.reward >= self._grpo.pass_reward for r in rollouts]
        groups = by_prompt(rollouts).values()
        numbers = {
            "reward": sum(r.score for r in rollouts) / answers,
            "pass_at_1": sum(passed) / answers,
            "pass_at_k": sum(any(r.reward >= self._grpo.pass_reward for r in group) for group in groups),
            "response_length": sum(r.length for r in rollouts) / answers,
            "ended": sum(r.ended for r in rollouts) / answers,
        }
        sums = {name: torch.tensor(float(value), device=device) for name, value in numbers.items()}
        return LossOutput(-sums["reward"], sums)

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        names = ("loss", "reward", "pass_at_1", "pass_at_k", "response_length", "ended")
        return {name: ratio(sums, name) for name in names}

    def dummy_micro_batch(self, texts: PromptCompletionBatch) -> GRPOMicroBatch:
        nothing = np.zeros(int(texts.targets.sum()), np.float32)
        lengths = [int(n) for n in texts.targets.sum(-1) if n]
        return GRPOMicroBatch(texts, lengths, nothing, nothing, nothing, nothing)
