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
from trainer.model.quantization import keep_weights_packed, quantization_config
from trainer.recipe.model import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Loaded:
    """``bytes_read``: bytes of weight files read; ``peak_host_bytes``: the process's peak over what it held before."""

    model: PreTrainedModel
    bytes_read: int
    peak_host_bytes: int


def build(section: ModelSection, folder: Path, device: torch.device, *, full: bool, checkpointing: bool) -> Loaded:
    """Loads the causal LM in ``folder`` whole; ``full``: all its parameters will be trained.

    Raises InputError when the files are not a causal LM that transformers can load.
    """
    before = _resident_bytes()
    model = _load_whole(section, folder, device, torch.float32 if full else getattr(torch, section.dtype))
    keep_weights_packed(model)
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


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
