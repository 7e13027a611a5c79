"""The settings with which bitsandbytes quantises frozen weights."""

from __future__ import annotations

import re
from typing import Any

import torch

from trainer.errors import InputError
from trainer.experts import expert_weights
from trainer.experts.packed import packed_in
from trainer.modules import computes_plain_product
from trainer.recipe.sections.model import ModelSection

LEFT_SHARE = 0.05
"""The largest share of the weights of linear layers and experts that a quantisation may leave as they are."""
SHOWN = 4


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


def check_packed(model: Any, section: ModelSection, skipped: list[str] | None = None) -> None:
    """Raises InputError when less than nearly all of the weights that a quantisation should pack are packed: those of
    linear layers and experts. Not counted are the output head, ``skipped`` modules, and weights that layers share,
    which transformers leaves as they are."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    output = model.get_output_embeddings()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    shared = set(names) - {name for name, _ in model.named_parameters()}
    first = {id(model.get_parameter(name)) for name in shared}
    packed, left = 0, {}
    stacks = expert_weights(model)
    found = {part for weight in stacks.values() for part in weight.owner.modules()}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            packed += module.in_features * module.out_features
        elif computes_plain_product(type(module)) and module is not output and id(module.weight) not in first:
            left[name] = module.weight.numel()
        elif module not in found and "experts" in name.split("."):
            # In a form in which experts are not found: those of DBRX are a matrix.
            own = module.named_parameters(recurse=False)
            left |= {f"{name}.{n}": p.numel() for n, p in own if p.dim() == 2}
    left = {n: size for n, size in left.items() if not any(f"{n}.".startswith(f"{skip}.") for skip in skipped or ())}
    for name, weight in stacks.items():
        if packed_in(weight.owner):
            packed += weight.shape.numel()
        else:
            left[name] = weight.shape.numel()
    if sum(left.values()) > LEFT_SHARE * (packed + sum(left.values())):
        shown = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in left})[:SHOWN])
        raise InputError(
            f"model.quantization {section.quantization} leaves {sum(left.values()):,} of "
            f"{packed + sum(left.values()):,} elements of linear layers and experts of {section.path!r} as they are "
            f"({shown}): " + ("use nf4" if section.quantization == "int8" else "use model.quantization: none")
        )
