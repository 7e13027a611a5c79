"""The engines that write texts in training."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class RolloutEngineRow(Choice):
    """An engine's row. ``serves``: servers write, which have the base model and get the adapter. ``starts``: muster can
    start the servers."""

    serves: bool = True
    starts: bool = False


_SERVERS = "trainer.tasks.rollouts.engine:ServerEngine"

ROLLOUT_ENGINES = Registry(
    "rollout engine",
    {
        "transformers": RolloutEngineRow("trainer.tasks.rollouts.engine:ModelEngine", serves=False),
        "vllm": RolloutEngineRow(_SERVERS, starts=True),
        "openai": RolloutEngineRow(_SERVERS),
    },
)
