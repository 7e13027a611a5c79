"""How bitsandbytes is told to hold frozen weights, and kept from a trap."""

from __future__ import annotations

from typing import Any

import torch

from trainer.recipe.sections.model import ModelSection


def quantization_config(section: ModelSection, skipped: list[str] | None = None) -> Any:
    """NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) or LLM.int8(), or None. ``skipped``:
    modules that stay as they are; by default the output head.

    The packed bytes are stored as the compute dtype, so that whatever casts a layer's parameters to it leaves them be.
    """
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, section.dtype)
    if section.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
            llm_int8_skip_modules=skipped,
        )
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return None


def keep_weights_packed(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for AVX512-BF16: a forward in eval mode would do it for good, and
    the training forwards after it would go through a kernel without a gradient, silently."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            object.__setattr__(module, "support_avx512bf16_for_cpu", False)
