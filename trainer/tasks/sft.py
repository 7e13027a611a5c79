"""Supervised fine-tuning: the likelihood of the target tokens, given all tokens before them in the same sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from trainer.tasks.base import Measured, Task, ratio
from trainer.tasks.head import TargetHead

if TYPE_CHECKING:
    from trainer.data import Batch

MAX_EXPONENT = 700.0


class SFT(Task):
    def attach(self, model: torch.nn.Module) -> None:
        self._head = TargetHead(model)

    def measure(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> Measured:
        return Measured(self.loss_sum(module, batch, device), {})

    def loss_sum(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        input_ids = torch.from_numpy(batch.input_ids).to(device)
        positions = torch.from_numpy(batch.position_ids).to(device)
        predicted = torch.from_numpy(batch.targets).to(device)
        # The hidden state at a position predicts the token after it; no sample's first token is a target, so that the
        # position before a target always belongs to the same sample.
        predicting = torch.zeros_like(predicted)
        predicting[:, :-1] = predicted[:, 1:]
        labels = input_ids[predicted]
        with self._head.select(predicting, labels):
            output = module(input_ids=input_ids, position_ids=positions, use_cache=False)
        return self._head.nll(output.logits, labels).sum()

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        loss = ratio(sums, "loss")
        return {"loss": loss, "perplexity": math.exp(min(loss, MAX_EXPONENT))}
