"""Low-rank updates of other products (LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098): the elementwise product (B1 A1) * (B2 A2). Its rank is up to r² with the
parameters of rank 2r.
LoKr: the Kronecker product of a small matrix and a larger one, which is low-rank where that saves parameters. The
split is near the square root of each dimension, or is given by ``factor``.
One factor starts at zero in each, so that the first forward equals that of the base model.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.adapters.peft_method import PeftMethod


class LoHa(PeftMethod):
    peft_type = "LOHA"

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {"r": section.rank, "alpha": section.alpha, "rank_dropout": section.dropout}

    def starts_at_zero(self, saved_name: str) -> bool:
        return saved_name.endswith(".hada_w2_a")


class LoKr(LoHa):
    peft_type = "LOKR"

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        return {**super().settings(base), "decompose_factor": self.recipe.adapter.factor}

    def starts_at_zero(self, saved_name: str) -> bool:
        return saved_name.endswith(".lokr_w1")
