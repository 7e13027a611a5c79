"""Fused kernels of liger-kernel (Hsu et al. 2024, arXiv:2410.10989), an optional package, in a model of transformers.

Its loss is not used: muster's own computes logits at targets only, in chunks, whatever the sharding."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from trainer.errors import InputError

OWN_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def use_liger(model: Any) -> None:
    """Changes the modules of the (unwrapped) model in place, and their rotary embeddings for the whole process.

    Raises InputError without the package, and for a model type for which it has no kernels."""
    try:
        importlib.metadata.version("liger-kernel")
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except (importlib.metadata.PackageNotFoundError, ImportError) as error:
        raise InputError(
            f"compute.kernels liger needs the package liger-kernel ({error}): pip install liger-kernel, or set "
            "compute.kernels=none"
        ) from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(
            f"compute.kernels: liger-kernel has none for models of type {kind!r}; set compute.kernels=none, or use "
            f"one of {', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}"
        )
    _apply_liger_kernel_to_instance(model=model, **OWN_LOSS)
