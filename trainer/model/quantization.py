"""The settings with which bitsandbytes quantises frozen weights."""

from __future__ import annotations

from typing import Any

import torch

from trainer.linear import computes_plain_product
from trainer.recipe.sections.model import ModelSection


def quantization_config(section: ModelSection, skipped: list[str] | None = None) -> Any:
    """Returns settings for NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) or LLM.int8(),
    None without quantisation. ``skipped``: modules that stay unquantised; by default the output head."""
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, section.dtype)
    if section.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,  # so that a cast of the layer's parameters to dtype keeps the packed bytes
            llm_int8_skip_modules=skipped,
        )
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return None


def keep_weights_packed(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for AVX512-BF16."""
    # A forward in eval mode would repack them permanently, and later training forwards would silently use a kernel
    # without a gradient.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            object.__setattr__(module, "support_avx512bf16_for_cpu", False)


def plain_subclasses(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Returns the layers of subclasses of ``nn.Linear`` that compute the same product."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and type(m) is not torch.nn.Linear]
    plain = {kind: computes_plain_product(kind) for kind in {type(layer) for layer in layers}}
    return [layer for layer in layers if plain[type(layer)]]
