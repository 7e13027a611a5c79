"""The strategy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from trainer.recipe import zero
from trainer.recipe.base import Conflict, OneOf, Section, takes
from trainer.recipe.strategies import STRATEGIES, StrategyRow


class StrategySection(Section):
    """The distribution of the model over the workers."""

    kind: Annotated[str, OneOf(STRATEGIES)] = "ddp"
    """`ddp` keeps the complete model on each worker and is fastest if it fits; `fsdp` (torch's FSDP2) gives each worker
    a slice of every layer, so that memory per worker falls with the number of workers; `zero2` (DeepSpeed) shards
    gradients and optimizer state only, `zero3` parameters too."""

    replicas: int = Field(default=1, ge=1)
    """With `fsdp`: number of copies of the parameters (hybrid sharding, HSDP). The ranks of a copy shard it among
    themselves and exchange parameters in every layer; across copies only the gradients of trained parameters are
    exchanged. Nodes with a fast network inside and a slower one between them are fastest with one copy per node, if it
    fits there. Divides the largest number of `resources.workers`; a run that continues with fewer workers has fewer
    replicas."""

    context_parallel: int = Field(default=1, ge=1)
    """With `ddp` or `fsdp`: number of ranks that compute each pack together, for packs whose activations do not fit on
    one. Each has a part of the tokens; in attention each has all tokens of a part of the heads (Ulysses, Jacobs et al.
    2023, arXiv:2309.14509). Divides `resources.workers`, and is best a divisor of the model's key-value heads and of a
    node's ranks."""

    reshard_after_forward: bool = True
    """With `fsdp`: a layer's parameters are freed after its forward and gathered again for its backward. `false` keeps
    them until the backward: faster, but needs memory for all parameters of the model in the compute type."""

    offload: bool = False
    """With `fsdp`: parameters, gradients and optimizer state are stored in the host's memory, and the update runs
    there; a layer is copied to the device while it computes. Slow, for models that do not fit otherwise."""

    deepspeed: Annotated[
        str | dict[str, Any] | None, takes("the name of a file in deepspeed/, or ZeRO settings by name")
    ] = Field(default=None, examples=["zero3_offload"])
    """With `zero2` or `zero3`: a file of `deepspeed/` by its name (`zero2`, `zero2_offload`, `zero3`, `zero3_offload`),
    or the settings of DeepSpeed's `zero_optimization` themselves. Without it, the file of the kind's name."""

    @property
    def row(self) -> StrategyRow:
        return STRATEGIES[self.kind]

    def conflicts(self) -> Iterator[Conflict]:
        if self.row.zero_stage:
            for message in zero.mistakes(self.kind, self.deepspeed):
                yield Conflict((("deepspeed",), ("kind",)), message)
        for name in self.given():
            if name not in ("kind", *self.row.settings):
                hint = "leave it out"
                if name == "offload" and self.row.zero_stage:
                    hint = f"name deepspeed: {self.kind}_offload instead"
                yield Conflict(((name,), ("kind",)), f"has no effect with strategy.kind {self.kind}; {hint}")
