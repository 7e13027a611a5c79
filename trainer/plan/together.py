"""The memory of several runs that share a base model: the base once, and of each run its adapter and its rows."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.plan.result import Plan, RankPlan


def added_bytes(rank: RankPlan) -> int:
    """Returns the bytes on the device that a run adds to others on the same base model."""
    return rank.trainable_bytes + rank.gradient_bytes + rank.optimizer_bytes + rank.activation_bytes


def together_bytes(plans: Sequence[Plan]) -> int:
    """Returns the peak on the device of the rank that needs most, for runs that are trained together. ``plans``: of
    each run alone, on the same number of ranks."""
    first, *others = (plan.ranks for plan in plans)
    added = [sum(map(added_bytes, ranks)) for ranks in zip(*others, strict=True)] or [0] * len(first)
    return max(rank.peak_device_bytes + more for rank, more in zip(first, added, strict=True))


def most_together(plan: Plan) -> int | None:
    """Returns how many runs like this one fit on the device together; None without a limit."""
    if plan.limits.device is None:
        return None
    left = plan.limits.device - plan.device_reserve_bytes - plan.peak_device_bytes
    return 0 if left < 0 else 1 + left // max(1, added_bytes(plan.largest))
