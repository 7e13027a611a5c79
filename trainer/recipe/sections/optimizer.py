"""The optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict, WithJsonSchema, model_validator

from trainer.errors import UsageError
from trainer.recipe.base import Conflict, Section, names_or_code, takes
from trainer.recipe.optimizers import OPTIMIZERS, OptimizerRow, optimizer_row

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
SETTINGS = tuple(dict.fromkeys(setting for _, row in OPTIMIZERS.items() for setting in row.uses))
"""The fields that an optimizer may use or not."""


def _known(name: str) -> str:
    name = OPTIMIZERS.also.get(name, name)
    try:
        optimizer_row(name)
    except UsageError as error:
        raise ValueError(f"{error}, and not module:Attribute") from None
    return name


Name = Annotated[
    str,
    AfterValidator(_known),
    WithJsonSchema(names_or_code((*OPTIMIZERS.names(), *OPTIMIZERS.also))),
]


class OptimizerSection(Section):
    """The optimizer, and its settings. `docs/optimizers.md` compares the optimizers."""

    name: Name = "adamw"
    """A row of the table in `docs/optimizers.md`, or `module:Attribute`: a class of your own, which is imported from
    the working folder and gets parameter groups."""

    lr: float = Field(gt=0.0, examples=[2e-4])
    """Peak learning rate, reached after the warm-up. Adapters need about ten times the rate of full fine-tuning: 1e-4
    to 5e-4 instead of 1e-5 to 5e-5. `lion` needs a third to a tenth of AdamW's rate, `sgd` much more."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay per step, as a fraction of lr; norms and biases do not decay. `sgd` adds it to the
    gradient instead."""

    betas: Annotated[tuple[Beta, Beta], Strict(False), takes("two numbers from 0 to below 1")] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square; `lion` takes 0.99 as the second one by
    default."""

    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the denominator of the update."""

    momentum: Beta | None = None
    """Decay rate of the momentum of `muon` (by default 0.95) and `sgd` (by default 0.9; 0 keeps no state)."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the optimizer's constructor, for example `ns_steps: 5` of `muon`. They are checked
    against its signature when the run starts."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_row(cls, data: Any) -> Any:
        # Here and not where they are used, so that a frozen recipe contains the values that its run has.
        if not isinstance(data, dict) or not isinstance(name := data.get("name", "adamw"), str):
            return data
        row = OPTIMIZERS.get(OPTIMIZERS.also.get(name, name))
        return {**(row.uses if row else {}), **data}

    @property
    def row(self) -> OptimizerRow:
        return optimizer_row(self.name)

    def conflicts(self) -> Iterator[Conflict]:
        for setting in SETTINGS:
            if setting in self.given() and setting not in self.row.uses and not self.row.named_by_user:
                users = [name for name, row in OPTIMIZERS.items() if setting in row.uses]
                message = f"has no effect with optimizer.name {self.name}; leave it out, or choose {' or '.join(users)}"
                yield Conflict(((setting,), ("name",)), message)
            if setting in self.settings:
                yield Conflict((("settings", setting),), f"has its own place: write optimizer.{setting}")
        for setting in ("lr", "params", *self.row.fixed):
            if setting in self.settings:
                message = f"cannot be set here: muster sets it, for optimizer.name {self.name}"
                yield Conflict((("settings", setting),), message)
        if self.row.averages and self.betas[0] == 0:
            yield Conflict((("betas",), ("name",)), f"the first one cannot be 0 with optimizer.name {self.name}")
