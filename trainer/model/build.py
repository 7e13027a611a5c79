"""Builds the base model that a rank trains on: quantised or not, on the rank's device, ready for an adapter.

Parameters that are trained are kept in float32 (the optimizer's updates are too small for bfloat16); the forward runs
under autocast in the recipe's dtype. Frozen parameters are held in the recipe's dtype, or packed by bitsandbytes.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import InputError
from trainer.recipe.model import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Loaded:
    """``bytes_read``: bytes of weight files read; ``peak_host_bytes``: the process's peak over what it held before."""

    model: PreTrainedModel
    bytes_read: int
    peak_host_bytes: int


def quantization_config(section: ModelSection) -> Any:
    """NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) or LLM.int8(), or None.

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
        )
    return BitsAndBytesConfig(load_in_8bit=True) if section.quantization == "int8" else None


def build(section: ModelSection, folder: Path, device: torch.device, *, full: bool, checkpointing: bool) -> Loaded:
    """Loads the causal LM in ``folder`` whole; ``full``: all its parameters will be trained.

    Raises InputError when the files are not a causal LM that transformers can load.
    """
    before = _resident_bytes()
    model = _load_whole(section, folder, device, torch.float32 if full else getattr(torch, section.dtype))
    _keep_weights_packed(model)
    model.requires_grad_(full)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    read = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return Loaded(model, read, max(0, _peak_bytes() - before))


def _load_whole(section: ModelSection, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=dtype,
            quantization_config=quantization_config(section),
            device_map={"": device},
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `_check_whole` says which, where transformers only says that there are some
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as e:
        raise InputError(f"model.path {section.path!r} cannot be loaded as a causal language model: {e}") from e
    model, loading = loaded
    _check_whole(section.path, loading)
    return model


def _check_whole(path: str, loading: Mapping[str, Any]) -> None:
    """transformers draws what a file lacks, or has in another shape, at random: differently on every rank, with a
    warning."""
    unlike = sorted(loading["mismatched_keys"])
    if unlike:
        name, stored, wanted = unlike[0]
        raise InputError(
            f"model.path {path!r}: {len(unlike)} weights have not the shape that config.json asks for ({name}: "
            f"{list(stored)} stored, {list(wanted)} asked for); put the config.json that belongs to the weights there"
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"model.path {path!r} lacks {len(missing)} weights of a causal language model ({', '.join(missing[:3])}); "
            "name a checkpoint that was saved whole, with its output head"
        )


def _keep_weights_packed(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for AVX512-BF16: a forward in eval mode would do it for good, and
    the training forwards after it would go through a kernel without a gradient, silently."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            object.__setattr__(module, "support_avx512bf16_for_cpu", False)


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
