"""The strategies: what each one shards, and the settings that have an effect on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class StrategyRow(Choice):
    """A strategy's row.

    ``shards``: what is divided between the ranks: nothing, gradients and optimizer states, or parameters as well.
    ``settings``: the fields of the recipe's section that have an effect on it. ``zero_stage``: DeepSpeed's, or 0.
    ``plan_runs_wrap``: `wrap` works in a fake process group, so that the plan can measure what it gathers."""

    shards: Literal["nothing", "states", "parameters"] = "nothing"
    settings: tuple[str, ...] = ()
    zero_stage: int = 0
    plan_runs_wrap: bool = False

    @property
    def sharded(self) -> bool:
        """True if anything is divided between the ranks."""
        return self.shards != "nothing"


STRATEGIES = Registry(
    "strategy",
    {
        "ddp": StrategyRow("trainer.strategies.ddp:DDP", settings=("context_parallel",)),
        "fsdp": StrategyRow(
            "trainer.strategies.fsdp:FSDP",
            "parameters",
            ("replicas", "context_parallel", "reshard_after_forward", "offload"),
            plan_runs_wrap=True,
        ),
        "zero2": StrategyRow("trainer.strategies.zero:Zero2", "states", ("deepspeed",), zero_stage=2),
        "zero3": StrategyRow("trainer.strategies.zero:Zero3", "parameters", ("deepspeed",), zero_stage=3),
    },
)
