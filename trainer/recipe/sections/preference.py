"""The settings of the tasks that learn from judged answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.recipe.base import Conflict, OneOf, Section
from trainer.recipe.dpo_losses import DPO_LOSSES


class DPOSection(Section):
    """Settings of `task: dpo`."""

    loss: Annotated[str, OneOf(DPO_LOSSES)] = "sigmoid"
    """Loss of a pair: `sigmoid` is DPO's own; `robust` corrects it for swapped preferences; `ipo` aims at a fixed
    margin instead of ever larger ones; `hinge`, `sppo`, `apo_zero`, `apo_down`, `discopop`: see
    [tasks.md](tasks.md#dpo)."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the link to the reference: the reward of an answer is beta times the amount that training has added
    to its log-likelihood. The paper has 0.1; smaller values let the model move further from the reference."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Fraction of the preferences that are assumed to be swapped; for `sigmoid` (conservative DPO) and `robust`. Above
    0, `sigmoid` no longer rewards ever larger margins."""

    discopop_tau: float = Field(default=0.05, gt=0.0)
    """Temperature τ of `discopop`: at which margin its loss changes from the logistic to the exponential one."""

    ld_alpha: float | None = Field(default=None, ge=0.0, le=1.0)
    """Weight of the tokens by which an answer is longer than the other one of its pair (LD-DPO, arXiv:2409.06411): 0
    compares equal lengths only, 1 or null counts every token."""

    rpo_alpha: float = Field(default=0.0, ge=0.0)
    """Weight of the negative log-likelihood per token of the chosen answer, which is added to the loss (RPO,
    arXiv:2404.19733, which has 1)."""

    precompute_reference: bool = False
    """Compute the reference's log-likelihoods of all samples once, before the first step, and store them beside the
    prepared data: one forward per step less, which pays from the second epoch on. Where the reference is not the model
    with its adapter off (`adapter.method: none` or `pissa`, `adapter.from`, trained biases), they are always stored."""

    def conflicts(self) -> Iterator[Conflict]:
        for name in dict.fromkeys(name for _, row in DPO_LOSSES.items() for name in row.uses):
            if name not in DPO_LOSSES[self.loss].uses and getattr(self, name) != type(self).model_fields[name].default:
                others = ", ".join(loss for loss, row in DPO_LOSSES.items() if name in row.uses)
                message = f"has no effect with dpo.loss {self.loss}; leave it out (it is for {others})"
                yield Conflict(((name,), ("loss",)), message)


class KTOSection(Section):
    """Settings of `task: kto`."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the link to the reference, as for `dpo`."""

    desirable_weight: float = Field(default=1.0, gt=0.0)
    """Weight of the loss of a desirable answer. The paper advises weights in inverse proportion to the numbers of
    desirable and undesirable answers, so that desirable_weight · desirable : undesirable_weight · undesirable lies
    between 1 and 4/3."""

    undesirable_weight: float = Field(default=1.0, gt=0.0)
    """Weight of the loss of an undesirable answer."""

    precompute_reference: bool = False
    """Compute the reference's log-likelihoods of all samples once and store them, as `dpo.precompute_reference`."""


class ORPOSection(Section):
    """Settings of `task: orpo`."""

    beta: float = Field(default=0.1, gt=0)
    """Factor of the odds ratio's loss, which is added to the negative log-likelihood of the chosen answer (λ in the
    paper)."""


class SimPOSection(Section):
    """Settings of `task: simpo`."""

    beta: float = Field(default=2.0, gt=0)
    """Factor of the reward: the reward of an answer is beta times the mean log-likelihood of its tokens."""

    gamma: float = Field(default=0.5, ge=0)
    """Margin by which the reward of the chosen answer is to exceed that of the rejected one, itself (not its ratio to
    beta). The paper has 0.3 to 1.6, with a beta of 2 to 2.5."""

    cpo_alpha: float = Field(default=0.0, ge=0)
    """Factor of the negative log-likelihood of the chosen answer, averaged over its tokens, that is added to the loss
    (CPO); 0 adds nothing."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Fraction of the preferences that are assumed to be swapped."""
