"""MiSS (Kang & Yin 2024, arXiv:2409.15371): one matrix per target, whose rows are shared by shards of the weight."""

from __future__ import annotations

from typing import Any

import torch

from trainer.adapters.peft_method import PeftMethod


class Miss(PeftMethod):
    peft_type = "MISS"

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {"r": section.rank, "miss_dropout": section.dropout}
