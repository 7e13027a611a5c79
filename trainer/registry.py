"""Registries: tables of the names that a recipe may give, each with the code that it selects.

A choice is one file plus one line here. The tables contain only text, so that a recipe is checked without importing the
code that it names; `Registry.load` imports on first use.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from trainer.errors import UsageError


def choose_hint(name: str, names: tuple[str, ...]) -> str:
    """Returns ``; did you mean 'lora'?`` when one of the names is close to the given one, else an empty text."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry:
    """Names of one kind of choice, each with the ``module:attribute`` that it loads."""

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._table = dict(table)

    def names(self) -> tuple[str, ...]:
        return tuple(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def require(self, name: str) -> str:
        """Returns the ``module:attribute`` of ``name``; raises UsageError with the known names."""
        if name not in self._table:
            raise UsageError(self._unknown(name))
        return self._table[name]

    def load(self, name: str) -> Any:
        """Imports the object that ``name`` selects; raises UsageError for a name that is not in the table."""
        module, attribute = self.require(name).split(":")
        return getattr(importlib.import_module(module), attribute)

    def _unknown(self, name: str) -> str:
        if not self._table:
            return f"{name!r} is not a {self.kind}: there is none to choose yet, leave it out"
        names = ", ".join(self._table)
        return f"{self.kind} {name!r} is not one of: {names}{choose_hint(name, self.names())}"


METHODS = Registry(
    "adapter method",
    {
        "lora": "trainer.adapters.lora:Lora",
        "rslora": "trainer.adapters.lora:RsLora",
        "dora": "trainer.adapters.lora:Dora",
        "pissa": "trainer.adapters.pissa:Pissa",
        "olora": "trainer.adapters.pissa:Olora",
        "loraplus": "trainer.adapters.lora:LoraPlus",
        "adalora": "trainer.adapters.adalora:AdaLora",
        "ia3": "trainer.adapters.ia3_vera:IA3",
        "vera": "trainer.adapters.ia3_vera:Vera",
        "oft": "trainer.adapters.oft:Oft",
        "boft": "trainer.adapters.oft:Boft",
        "loha": "trainer.adapters.lycoris:LoHa",
        "lokr": "trainer.adapters.lycoris:LoKr",
        "prefix": "trainer.adapters.prompts:Prefix",
        "prompt": "trainer.adapters.prompts:PromptTuning",
        "p_tuning": "trainer.adapters.prompts:PTuning",
        "adaption_prompt": "trainer.adapters.adaption_prompt:AdaptionPrompt",
        "peft": "trainer.adapters.peft_generic:ByName",
        "none": "trainer.adapters.full:Full",
    },
)

STRATEGIES = Registry(
    "strategy",
    {
        "ddp": "trainer.strategies.ddp:DDP",
        "fsdp": "trainer.strategies.fsdp:FSDP",
        "zero2": "trainer.strategies.zero:Zero2",
        "zero3": "trainer.strategies.zero:Zero3",
    },
)

TASKS = Registry(
    "task",
    {
        "sft": "trainer.tasks.sft:SFT",
        "classification": "trainer.tasks.classification:Classification",
        "reward": "trainer.tasks.reward:Reward",
        "dpo": "trainer.tasks.dpo:DPO",
        "ppo": "trainer.tasks.ppo.task:PPO",
    },
)

OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "trainer.optim.optimizers:adamw",
        "adamw_8bit": "trainer.optim.optimizers:adamw_8bit",
        "paged_adamw_8bit": "trainer.optim.optimizers:paged_adamw_8bit",
    },
)

FORMATS = Registry(
    "data format",
    {
        "completion": "trainer.data.formats.completion:Completion",
        "messages": "trainer.data.formats.messages:MessagesFormat",
        "instruction": "trainer.data.formats.instruction:Instruction",
        "qa": "trainer.data.formats.qa:QuestionAnswer",
        "text": "trainer.data.formats.text:TextFormat",
        "preference": "trainer.data.formats.preference:Preference",
        "classification": "trainer.data.formats.classification:ClassificationFormat",
    },
)

TRACKERS = Registry(
    "tracker",
    {
        "tensorboard": "trainer.tracking.tensorboard:TensorBoard",
        "wandb": "trainer.tracking.wandb:Wandb",
        "mlflow": "trainer.tracking.mlflow:Mlflow",
        "prometheus": "trainer.tracking.prometheus:Prometheus",
    },
)
