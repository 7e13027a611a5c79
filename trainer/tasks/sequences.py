"""Model inputs with one sequence per row, for sequence classifiers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import InputError
from trainer.tasks.inputs import to_device

if TYPE_CHECKING:
    from trainer.data import Batch


class SequenceInputs:
    """Makes the arguments of a model's forward. Pads are masked and get the model's own padding token, by which the
    models of transformers find the last token of a sequence. The model computes position ids itself.

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
        self._pad = int(base.config.get_text_config().pad_token_id)
        self._takes = inspect.signature(base.forward).parameters

    def of(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        input_ids = to_device(batch.input_ids, device)
        positions = to_device(batch.position_ids, device)
        real = positions == torch.arange(positions.shape[1], device=device)
        inputs: dict[str, Any] = {"input_ids": input_ids.masked_fill(~real, self._pad), "attention_mask": real.long()}
        if batch.token_types is not None and "token_type_ids" in self._takes:
            inputs["token_type_ids"] = to_device(batch.token_types, device).long()
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        return inputs
