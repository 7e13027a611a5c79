"""Logits at target positions only.

In instruction data most tokens belong to prompts, and with vocabularies of 128 k the LM head and the softmax cost more
than a small model's layers. So the head processes the hidden states of target positions only. The selection happens
*inside* the model's forward, where sharding strategies have gathered the head's weights.

If the logits are the head's plain output, the head also turns them into per-token losses, by a formula
(`trainer.tasks.cross_entropy`), chunk by chunk, so that at most ``CHUNK_LOGITS`` of them exist at a time. A frozen head
computes the derivatives of the losses too (`trainer.tasks.frozen_lm_head_loss`). For models that scale or cap their
logits after the head (``POST_HEAD``), the head returns the logits of the selected positions, and the loss is computed
from the model's output.

Shapes: B packs, L tokens, T targets in the micro-batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from trainer.errors import InputError
from trainer.tasks.cross_entropy import NLL, CrossEntropy
from trainer.tasks.frozen_lm_head_loss import frozen_cross_entropy
from trainer.tasks.inputs import model_inputs, to_device

if TYPE_CHECKING:
    from trainer.data import Batch
    from trainer.model.kernels.context import Context

CHUNK_LOGITS = 16 * 1024 * 1024
POST_HEAD = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier_scale",
)
"""Settings with which models of transformers change their logits after the head."""


class TargetHead:
    """Replaces the forward of a model's output embeddings while ``select`` is active, and in `last_logits`."""

    def __init__(self, model: Any, *, packed: bool = False) -> None:
        """``packed``: a row of a micro-batch may hold several samples."""
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: it is no causal language model")
        text_config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.plain = all(getattr(text_config, name, None) in (None, 0, 1, 1.0) for name in POST_HEAD)
        self._head = head
        self._project: Callable[[torch.Tensor], torch.Tensor] = head.forward
        self._vocabulary = int(getattr(head, "out_features", 0) or text_config.vocab_size)
        self._made: torch.Tensor | None = None
        self._compared = False
        self._config, self._packed = text_config, packed
        self._at: torch.Tensor | None = None
        self._labels_T: torch.Tensor | None = None
        self._cross_entropy = NLL
        self._last = False
        self.context: Context | None = None
        head.forward = self.output

    def losses(
        self, module: torch.nn.Module, batch: Batch, device: torch.device, formula: CrossEntropy = NLL
    ) -> torch.Tensor:
        """Returns the loss [T] of each target of the micro-batch, row by row, given the tokens before it in its sample.
        ``module`` is the model, wrapped or not."""
        at, labels = targets_of(batch)
        if self.context is None:
            inputs = self.inputs(batch.input_ids, batch.position_ids, device)
            return self._losses_at(module, inputs, to_device(at, device), to_device(labels, device), formula)
        mine, order = self.context.mine(at, batch.input_ids.shape[1])
        inputs = self.context.inputs(batch.input_ids, batch.position_ids, device)
        losses = self._losses_at(module, inputs, to_device(mine, device), to_device(labels[order], device), formula)
        return self.context.whole(losses, to_device(order, device), len(labels))

    def _losses_at(
        self,
        module: torch.nn.Module,
        inputs: dict[str, Any],
        at: torch.Tensor,
        labels_T: torch.Tensor,
        formula: CrossEntropy,
    ) -> torch.Tensor:
        with self.select(at, labels_T, formula):
            output: torch.Tensor = module(**inputs).logits
        if self.plain:
            self._compare(output)
            return output.reshape(-1)
        return formula.losses(output.reshape(len(labels_T), -1).float(), labels_T)

    def inputs(self, input_ids: np.ndarray, position_ids: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Returns the arguments with which `losses` calls the model, from arrays [B, L]."""
        kernel = getattr(self._config, "_attn_implementation", None)
        return model_inputs(input_ids, position_ids, device, kernel, self._packed)

    @contextmanager
    def select(self, at: torch.Tensor, labels_T: torch.Tensor, formula: CrossEntropy = NLL) -> Iterator[None]:
        """Restricts the head to ``at`` inside the context: the positions whose *next* token is a target, as a mask
        [B, L] or as indices [T] into the flattened packs. ``labels_T``: those next tokens."""
        self._at, self._labels_T, self._cross_entropy = at, labels_T, formula
        try:
            yield
        finally:
            self._at = self._labels_T = None

    def last_logits(self, module: torch.nn.Module, **inputs: Any) -> Any:
        """Returns the model's output, with logits [B, 1, V] of the last position of each row only."""
        self._last = True
        try:
            return module(**inputs)
        finally:
            self._last = False

    def output(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Returns what the model returns in place of its head's output."""
        if self._last:
            return self._project(hidden_BLD[:, -1:])
        if self._at is None or self._labels_T is None:
            return self._project(hidden_BLD)
        hidden_TD = selected(hidden_BLD, self._at)
        if not self.plain:
            return self._project(hidden_TD[None])
        # A clone: FSDP2 adds a hook to the tensor that the model returns, and would lose it on a view.
        return self._noted(self._of_targets(hidden_TD, self._labels_T)[None].clone())

    def _noted(self, made: torch.Tensor) -> torch.Tensor:
        self._made = None if self._compared else made.detach().clone()
        return made

    def computes_as(self, other: TargetHead) -> bool:
        """Returns True if both are asked for the same numbers of their targets now."""
        alike = type(self) is type(other) and self._cross_entropy == other._cross_entropy
        selects = all(head._at is not None and head.plain and not head._last for head in (self, other))
        return alike and selects

    def _of_targets(self, hidden_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """Returns the numbers [T, m] that the model returns in place of logits."""
        return self._chunked_losses(hidden_TD, labels_T)[:, None]

    def _compare(self, output: torch.Tensor) -> None:
        """Checks, in the first forward, that the model returns the head's output unchanged. Raises InputError for a
        model that changes its logits after the head in a way that ``POST_HEAD`` lacks."""
        # Otherwise a model that scales its logits would silently train on scaled losses.
        if self._made is not None and self._made.any():
            if not torch.equal(output.detach(), self._made):
                raise InputError(
                    "this model changes its logits after the output head, by a setting that muster does not know; "
                    f"it knows {', '.join(POST_HEAD)}"
                )
            self._compared = True
        self._made = None

    def _chunked_losses(self, hidden_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        formula = self._cross_entropy  # the backward computes chunks again, after the selection

        def of_chunk(hidden_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
            return formula.losses(self._project(hidden_TD).float(), labels_T)

        if self._is_frozen(hidden_TD):
            return frozen_cross_entropy(self._project, hidden_TD, labels_T, rows_of_chunk(self._vocabulary), formula)
        return in_chunks(of_chunk, hidden_TD, labels_T, self._vocabulary)

    def _is_frozen(self, hidden_TD: torch.Tensor) -> bool:
        """Returns True if the derivatives of the losses can be computed in the forward."""
        trained = any(parameter.requires_grad for parameter in self._head.parameters())
        # Not in float16: small probabilities would underflow, because the loss scale is applied only later.
        return hidden_TD.requires_grad and hidden_TD.dtype != torch.float16 and not trained


def outputs_of_several(heads: Sequence[TargetHead], hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the `TargetHead.output` of each head for its hidden states [B, L, D]. Those of heads with the same
    projection are computed at once, if all are asked for the same numbers."""
    first = heads[0]
    if not all(head.computes_as(first) for head in heads):
        return [head.output(rows_BLD) for head, rows_BLD in zip(heads, hidden, strict=True)]
    picked = [
        selected(rows_BLD, head._at) for head, rows_BLD in zip(heads, hidden, strict=True) if head._at is not None
    ]
    labels_T = torch.cat([head._labels_T for head in heads if head._labels_T is not None])
    made = first._of_targets(torch.cat(picked), labels_T)[None]
    parts = made.split([len(rows_TD) for rows_TD in picked], dim=1)
    return [head._noted(part) for head, part in zip(heads, parts, strict=True)]


def targets_of(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions, in the flattened rows, that predict the targets, and these targets: both [T]."""
    # The hidden state at a position predicts the token after it. No sample's first token is a target, so that the
    # position before a target always belongs to the same sample. Indices are computed on the host, which would have to
    # wait for the device if it indexed by a mask there.
    target_at = np.flatnonzero(batch.targets)
    return target_at - 1, batch.input_ids.ravel()[target_at]


def selected(hidden_BLD: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Selects hidden states [T, D] by a mask [B, L], or by indices [T] into the flattened packs."""
    return hidden_BLD[at] if at.dtype == torch.bool else hidden_BLD.flatten(0, 1)[at]


def rows_of_chunk(vocabulary: int) -> int:
    return max(1, CHUNK_LOGITS // vocabulary)


def in_chunks(
    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden_TD: torch.Tensor,
    labels_T: torch.Tensor,
    vocabulary: int,
) -> torch.Tensor:
    """Applies ``of`` to hidden states and labels, with at most ``CHUNK_LOGITS`` logits at a time. The logits of a chunk
    are not kept: the backward computes them again."""
    rows = rows_of_chunk(vocabulary)
    if len(labels_T) <= rows:
        return of(hidden_TD, labels_T)
    parts = [
        checkpoint(of, h, y, use_reentrant=False)
        for h, y in zip(hidden_TD.split(rows), labels_T.split(rows), strict=True)
    ]
    return torch.cat(parts)
