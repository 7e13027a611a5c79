"""Rewards computed by a model: a separate model, or an adapter and a head on the policy's base model.

A reward model with the policy's base model needs no second copy of it (`trainer.tasks.shared_adapter`).

Legend: B rows and L tokens of a micro-batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.tasks.reference import adapter_of
from trainer.tasks.rollouts.policy import PolicyHead
from trainer.tasks.rollouts.rollout import PromptCompletionBatch, Rollout
from trainer.tasks.shared_adapter import SharedAdapter

ADAPTER, HEAD = "reward", "reward_head"


class ModelRater:
    """A sequence classifier with one output, unsharded on this rank's device. It has its own tokenizer. Its input is
    the prompt, the text, and the end-of-text token if the text has ended, as in training."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model.eval(), tokenizer, device
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._pad = int(base.config.get_text_config().pad_token_id)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str], ended: Sequence[bool]) -> list[float]:
        if not prompts:
            return []
        rows = [self._tokens(*parts) for parts in zip(prompts, completions, ended, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self._pad] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            scores: list[float] = self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
        return scores

    def _tokens(self, prompt: str, completion: str, ended: bool) -> list[int]:
        before: list[int] = self.tokenizer(prompt)["input_ids"]
        after: list[int] = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        end = [self.tokenizer.eos_token_id] if ended and self.tokenizer.eos_token_id is not None else []
        return [*before, *after, *end]


@dataclass(frozen=True)
class SharedReward:
    """The result of a run of `task: reward`. ``head``: [1, D]. ``pad``: the token at whose positions the reward is
    never read."""

    adapter: SharedAdapter
    head: torch.Tensor
    pad: int

    def attach(self, model: Any) -> None:
        """Adds adapter and head to the policy's model; neither is trained. On the meta device they have no values yet;
        `init_parameter` returns them."""
        self.adapter.attach(model)
        place = model.get_input_embeddings().weight.device
        rows, columns = self.head.shape
        linear: Any = torch.nn.Linear
        head = torch.nn.utils.skip_init(linear, columns, rows, bias=False, device=place, dtype=torch.float32)
        head.weight = torch.nn.Parameter(self.head.float().to(place), requires_grad=False)
        model.add_module(HEAD, head)

    def owns_parameter(self, name: str) -> bool:
        return self.adapter.owns_parameter(name) or name == f"{HEAD}.weight"

    def init_parameter(self, name: str) -> torch.Tensor:
        return self.head.float() if name == f"{HEAD}.weight" else self.adapter.init_parameter(name)

    def rate(
        self, model: Any, head: PolicyHead, module: torch.nn.Module, rollouts: Sequence[Rollout], device: torch.device
    ) -> list[float]:
        """Returns the score of each rollout. Runs one forward, also without rollouts: under a strategy that gathers
        parameters, every rank must call it."""
        texts = PromptCompletionBatch.of([(r.prompt.tokens, r.tokens) for r in rollouts], -1, [])
        read = np.zeros_like(texts.targets)
        for row, rollout in enumerate(rollouts):
            ids = np.array([*rollout.prompt.tokens, *rollout.tokens])
            (real,) = (ids != self.pad).nonzero()
            read[row, real[-1] if len(real) else 0] = True
        with adapter_of(model, self.adapter.name):
            scores: list[float] = head.read(module, texts, read, getattr(model, HEAD), device).tolist()
        return scores
