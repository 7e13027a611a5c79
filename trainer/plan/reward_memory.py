"""The bytes that a reward model of its own takes on each rank: no strategy shards it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.model.meta import from_config
from trainer.plan.fake_quantized_linear import packed_sizes, stand_in
from trainer.plan.meta_model import quiet
from trainer.recipe import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def reward_bytes(section: ModelSection, config: PreTrainedConfig) -> int:
    """Raises InputError when no such sequence classifier can be built."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with quiet():
        model = from_config(
            section, config, full=False, checkpointing=False, auto_class=AutoModelForSequenceClassification
        )
        if section.quantization != "none":
            stand_in(model, getattr(torch, section.dtype))
    scales = sum(size.state_bytes for size in packed_sizes(model))
    return scales + sum(p.numel() * p.element_size() for p in model.parameters())
