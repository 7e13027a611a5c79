"""The optimizer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, Strict

from trainer.recipe.base import OneOf, Section, takes
from trainer.recipe.optimizers import OPTIMIZERS, OptimizerRow

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerSection(Section):
    """AdamW (Loshchilov & Hutter, 2019) in one of its forms."""

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    """`adamw` keeps 8 bytes of state per trainable parameter; `adamw_8bit` 2 bytes (bitsandbytes); `paged_adamw_8bit`
    moves the state to host memory when the device's memory is full."""

    lr: float = Field(gt=0.0, examples=[2e-4])
    """Peak learning rate, reached after the warm-up. Adapters need about ten times the rate of full fine-tuning: 1e-4
    to 5e-4 instead of 1e-5 to 5e-5."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay per step, as a fraction of lr; norms and biases do not decay."""

    betas: Annotated[tuple[Beta, Beta], Strict(False), takes("two numbers from 0 to below 1")] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""

    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the denominator of the update."""

    @property
    def row(self) -> OptimizerRow:
        return OPTIMIZERS[self.name]
