"""Log-probabilities, entropies and values of texts under the policy, computed inside the model's forward.

Inside the forward, sharding strategies have gathered the output head and a critic's head. Therefore that head is a
module of the model, next to the adapter: one linear layer in float32 on the last hidden states.

Shapes: B rows, L tokens, T tokens of texts in the micro-batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from trainer.errors import InputError
from trainer.tasks.inputs import to_device
from trainer.tasks.lm_head_loss import TargetHead, in_chunks, selected


class TokenStats(NamedTuple):
    """Statistics of the tokens of the texts, each [T]: ``logps``, the log-probability of a token; ``entropies``, the
    entropy of its distribution; ``values``, the value of the state before it, if there is a critic."""

    logps: torch.Tensor
    entropies: torch.Tensor
    values: torch.Tensor | None = None


class CompletionRows(Protocol):
    """Rows of tokens in the layout of `trainer.data.Batch`. ``targets`` marks the tokens of the texts."""

    input_ids: Any
    position_ids: Any
    targets: Any


class PolicyHead(TargetHead):
    """Replaces the forward of the output embeddings. In `score_tokens`, it turns logits into two numbers per token, or
    three with a critic, chunk by chunk."""

    def __init__(
        self, model: Any, temperature: float, task: str, *, critic: torch.nn.Module | None = None, entropy: bool = False
    ) -> None:
        """``critic``: a layer of the model from D to 1, which gives the values. ``entropy``: the loss depends on the
        entropies, which otherwise have no gradient."""
        super().__init__(model)
        if not self.plain:
            raise InputError(f"task {task} does not take models that scale or cap their logits after the output head")
        self._temperature, self._critic, self._entropy = temperature, critic, entropy
        self._by: torch.nn.Module | None = None

    def score_tokens(self, module: torch.nn.Module, texts: CompletionRows, device: torch.device) -> TokenStats:
        input_ids = to_device(texts.input_ids, device)
        targets = to_device(texts.targets, device)
        predicting = torch.zeros_like(targets)
        predicting[:, :-1] = targets[:, 1:]
        with self.select(predicting, input_ids[targets]):
            positions = to_device(texts.position_ids, device)
            made = module(input_ids=input_ids, position_ids=positions, use_cache=False).logits
        self._compare(made)
        return TokenStats(*made[0].unbind(-1))

    def read(
        self, module: torch.nn.Module, texts: CompletionRows, at_BL: Any, by: torch.nn.Module, device: torch.device
    ) -> torch.Tensor:
        """Returns the outputs [T] of ``by``, a layer of the model from D to 1, for the hidden states at the positions
        that ``at_BL`` marks."""
        input_ids = to_device(texts.input_ids, device)
        positions = to_device(texts.position_ids, device)
        at = to_device(at_BL, device)
        self._by = by
        try:
            with self.select(at, input_ids[at]):
                made = module(input_ids=input_ids, position_ids=positions, use_cache=False).logits
        finally:
            self._by = None
        scores: torch.Tensor = made[0, :, 0]
        return scores

    def output(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        if self._last:
            return self._project(hidden_BLD[:, -1:])
        if self._at is None or self._labels_T is None:
            return self._project(hidden_BLD)
        hidden_TD = selected(hidden_BLD, self._at)
        if self._by is not None:
            with torch.autocast(hidden_TD.device.type, enabled=False):
                read: torch.Tensor = self._by(hidden_TD.float())
            return read[None].clone()
        columns = [in_chunks(self._of_logits, hidden_TD, self._labels_T, self._vocabulary)]
        if self._critic is not None:
            with torch.autocast(hidden_TD.device.type, enabled=False):
                columns.append(self._critic(hidden_TD.float()))
        # A clone: FSDP2 adds a hook to the tensor that the model returns, and would lose it on a view.
        made = torch.cat(columns, -1)[None].clone()
        self._made = None if self._compared else made.detach().clone()
        return made

    def _of_logits(self, hidden_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """Returns the log-probability of the label, and the entropy: [T, 2]."""
        logps_TV = (self._project(hidden_TD).float() / self._temperature).log_softmax(-1)
        chosen = logps_TV.gather(-1, labels_T[:, None])
        with torch.set_grad_enabled(self._entropy and torch.is_grad_enabled()):
            entropies = -(logps_TV.exp() * logps_TV).sum(-1, keepdim=True)
        return torch.cat([chosen, entropies], -1)
