"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.recipe.base import MAY_CHANGE, Conflict, Section, takes

LENGTH = (("steps",), ("epochs",))


class EarlyStopSection(Section):
    """The end of a run whose evaluations do not improve any more. It ends successfully, with a final adapter."""

    metric: str = Field(examples=["eval_loss"])
    """Metric of the evaluations, such as `eval_loss`; the task decides if lower or higher is better."""

    patience: int = Field(ge=1, examples=[3])
    """Evaluations in a row without an improvement after which the run ends."""

    min_delta: float = Field(default=0.0, ge=0.0)
    """An evaluation is an improvement if it is better than the best one before by more than this, in the metric's own
    unit."""


class TrainingSection(Section):
    """The length of the run and the sizes of its batches."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the complete run. Exactly one of `steps` and `epochs` is given."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the training data, instead of `steps`. The last step of an epoch may be smaller."""

    global_batch: int = Field(ge=1, examples=[64])
    """Packs per optimizer step, over all ranks, whatever their number: the result does not depend on the workers."""

    micro_batch: Annotated[int, MAY_CHANGE] = Field(ge=1, examples=[4])
    """Packs per forward pass of one rank. Activation memory grows in proportion. The result stays the same, within the
    rounding noise of float32, except for random numbers that belong to a forward pass: dropout, NEFTune, and the texts
    of task `ppo`."""

    gradient_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Compute activations again in the backward pass instead of keeping them: needs much less memory, but one more
    forward pass per step."""

    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this L2 norm, taken over the whole model and all ranks; null never clips."""

    router_aux_loss_coef: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0.0)] | None, takes("auto, a number above 0, or null")
    ] = None
    """For a mixture of experts: factor of the loss that keeps its experts evenly used, which is added to the loss of
    training; `auto` is the factor in the model's configuration, null adds nothing. See
    [tasks.md](tasks.md#the-balance-of-experts)."""

    eval_every: Annotated[int | None, MAY_CHANGE] = Field(default=None, ge=1)
    """Steps between evaluations on `data.eval`; null evaluates after the last step only."""

    early_stop: Annotated[EarlyStopSection | None, MAY_CHANGE] = None
    """End the run before its last step when its evaluations do not improve any more; null trains to the last step.
    Needs `eval_every`."""

    stop_after: Annotated[int | None, MAY_CHANGE] = Field(default=None, ge=1)
    """Stop this attempt at this step with a checkpoint and exit code 3; the same command without it resumes. Counted
    from the run's first step."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.steps is None and self.epochs is None:
            yield Conflict(LENGTH, "is missing: give training.steps, or training.epochs instead")
        if self.steps is not None and self.epochs is not None:
            message = (
                f"is {self.steps} and training.epochs is {self.epochs}; give one of them, and set the other to null"
            )
            yield Conflict(LENGTH, message)
        if self.micro_batch > self.global_batch:
            message = f"{self.micro_batch} packs per forward pass are more than the {self.global_batch} of a step"
            yield Conflict(
                (("micro_batch",), ("global_batch",)), f"{message}; lower it to training.global_batch or less"
            )
