"""Orthogonal fine-tuning: the weight is rotated, R W, so that the angles between its neurons do not change.

OFT (Qiu et al. 2023, arXiv:2306.07280; with the Cayley-Neumann form of arXiv:2506.19847): R is block-diagonal, each
block of ``block_size`` the Cayley transform of a trained skew-symmetric matrix, which starts at zero: R = I.
BOFT (Liu et al. 2023, arXiv:2311.06243): R is a product of ``butterfly_factors`` block-diagonal matrices with
permutations between them, so that few parameters reach every dimension.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.adapters.peft_method import PeftMethod


class Oft(PeftMethod):
    peft_type = "OFT"

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {"oft_block_size": section.block_size, "module_dropout": section.dropout, "bias": section.bias}

    def starts_at_zero(self, saved_name: str) -> bool:
        return ".oft_R." in saved_name


class Boft(PeftMethod):
    peft_type = "BOFT"

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {
            "boft_block_size": section.block_size,
            "boft_n_butterfly_factor": section.butterfly_factors,
            "boft_dropout": section.dropout,
            "bias": section.bias,
        }

    def starts_at_zero(self, saved_name: str) -> bool:
        return saved_name.endswith(".boft_R")
