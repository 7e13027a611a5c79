"""The outputs of sequence classifiers, with one sequence per row.

Legend: B rows, L tokens, V outputs of the head."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.errors import InputError
from trainer.modules import head_module
from trainer.tasks.inputs import to_device

if TYPE_CHECKING:
    from trainer.data import Batch
    from trainer.model.kernels.context import Context


class SequenceOutputs:
    """Computes a classifier's outputs. Pads are masked and get the model's own padding token, by which the models of
    transformers find the last token of a sequence. The model computes position ids itself.

    Raises InputError for a model with an encoder and a decoder."""

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(
            base.config, "is_encoder_decoder", False
        ):  # its head reads the end-of-text token, which a cut text lacks
            raise InputError(
                f"{type(base).__name__} has an encoder and a decoder, and classifiers are trained on an encoder or a "
                "decoder alone; name another model.path"
            )
        self._base, self._pad = base, int(base.config.get_text_config().pad_token_id)
        self._takes = inspect.signature(base.forward).parameters
        self.context: Context | None = None

    def of(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        """Returns the outputs [B, V]. ``module`` is the model, wrapped or not."""
        if self.context is not None:
            return self._together(self.context, module, batch, device)
        outputs: torch.Tensor = module(**self._inputs(batch, device)).logits
        return outputs

    def _inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        input_ids = to_device(batch.input_ids, device)
        positions = to_device(batch.position_ids, device)
        real = positions == torch.arange(positions.shape[1], device=device)
        inputs: dict[str, Any] = {"input_ids": input_ids.masked_fill(~real, self._pad), "attention_mask": real.long()}
        if batch.token_types is not None and "token_type_ids" in self._takes:
            inputs["token_type_ids"] = to_device(batch.token_types, device).long()
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        return inputs

    def _together(self, context: Context, module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        """Takes the head's output for the last token of each row from the rank that has this token."""
        rows, length = batch.input_ids.shape
        columns = np.arange(length)
        text = (batch.position_ids == columns) & (batch.input_ids != self._pad)
        last = np.where(text, columns, 0).max(-1)
        mine, order = (to_device(part, device) for part in context.mine(np.arange(rows) * length + last, length))

        def of_each_row(_: Any, __: Any, scores_BnV: torch.Tensor) -> torch.Tensor:
            scores_BV = context.whole(scores_BnV.flatten(0, 1)[mine], order, rows)
            return scores_BV[:, None].expand(scores_BnV.shape)  # whichever token the model selects

        with head_module(self._base).register_forward_hook(of_each_row):
            outputs: torch.Tensor = module(**context.inputs(batch.input_ids, batch.position_ids, device)).logits
        return outputs
