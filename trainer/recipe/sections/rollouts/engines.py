"""The engines that write texts in training."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class RolloutEngineRow(Choice):
    """An engine's row. ``dialect``: of the servers that write, which have the base model and get the adapter
    (`trainer.inference.dialects`); empty if no server does. ``starts``: muster can start the servers."""

    dialect: str = ""
    starts: bool = False

    @property
    def serves(self) -> bool:
        """True if servers write."""
        return bool(self.dialect)


_SERVERS = "trainer.tasks.rollouts.engine:ServerEngine"

ROLLOUT_ENGINES = Registry(
    "rollout engine",
    {
        "transformers": RolloutEngineRow("trainer.tasks.rollouts.engine:ModelEngine"),
        "vllm": RolloutEngineRow(_SERVERS, "vllm", starts=True),
        "openai": RolloutEngineRow(_SERVERS, "vllm"),
        "sglang": RolloutEngineRow(_SERVERS, "sglang"),
    },
)
