"""An earlier place of `trainer.tasks.rewards.shipped`, which recipes may still name."""

from __future__ import annotations

from trainer.tasks.rewards.shipped import gsm8k

__all__ = ["gsm8k"]
