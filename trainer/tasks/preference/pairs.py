"""Metrics of preference pairs, shared by the tasks that compute a reward for each answer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.tasks.base import ratio


def pair_sums(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the sums for `pair_metrics` from the rewards of both answers to each pair. A tie counts as wrong."""
    chosen, rejected = chosen.detach(), rejected.detach()
    right = (chosen > rejected).sum()
    return {
        "pairs": torch.full_like(right, len(chosen)),
        "right": right,
        "chosen": chosen.sum(),
        "rejected": rejected.sum(),
    }


def pair_metrics(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns ``pair_accuracy``, the share of pairs whose chosen answer has the higher reward, and mean rewards."""
    pairs = max(1.0, float(sums["pairs"]))
    chosen, rejected = float(sums["chosen"]) / pairs, float(sums["rejected"]) / pairs
    return {
        "pair_accuracy": float(sums["right"]) / pairs,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
    }


def evaluated(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {"loss": ratio(sums, "loss"), **pair_metrics(sums)}
