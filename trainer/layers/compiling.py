"""torch.compile of each decoder layer separately.

The layers are alike, so that one program serves all of them (and a second one the first layer, if its input needs no
gradient). The hooks that strategies add to a layer are not compiled: they run around the compiled forward, as they run
around the plain one. So does gradient checkpointing, which runs the program again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from trainer.errors import InputError
from trainer.layers.find import decoder_layers

BACKEND = "inductor"
MOST_PROGRAMS = 64
"""Limit of compiled programs per forward function. A layer has a few: with gradients and without, one pack and several,
the first layer's. Beyond torch's own limit of 8, torch would only warn and run the layer uncompiled."""


class Compiled(NamedTuple):
    """Time spent on compiling in this process, in ``seconds``, and the number of ``programs`` compiled."""

    seconds: float
    programs: int


class Warmup:
    """Measures the time spent on compiling between two calls of `taken`."""

    def __init__(self, compiles: bool) -> None:
        self._before = _so_far() if compiles else None

    def taken(self) -> Compiled | None:
        """Returns the time and programs since the last call; None if nothing was compiled."""
        if self._before is None:
            return None
        now, before = _so_far(), self._before
        self._before = now
        taken = Compiled(now.seconds - before.seconds, now.programs - before.programs)
        return taken if taken.programs else None


def compile_layers(model: torch.nn.Module, device: torch.device) -> int:
    """Replaces the forward of each decoder layer by one that is compiled when it first runs (forward and backward).
    Returns the number of layers. Called before the strategy wraps the model.

    Raises InputError if there is no compiler for ``device``."""
    if BACKEND == "inductor":
        _check_compiler(device)
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_PROGRAMS)
    layers: list[Any] = decoder_layers(model)
    # Dropout draws the same numbers as without a compiler, so that `compute.compile` does not change the result.
    options: Any = {"options": {"fallback_random": True}} if BACKEND == "inductor" else {}
    for layer in layers:
        # Dynamic sizes from the start: otherwise the first lengths would decide which program later lengths run.
        layer.forward = _checkpointed(layer, torch.compile(layer.forward, dynamic=True, backend=BACKEND, **options))
    return len(layers)


def _checkpointed(layer: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a forward that runs ``compiled`` under the layer's gradient checkpointing, if it is enabled."""
    if not getattr(layer, "gradient_checkpointing", False):
        return compiled
    # transformers checkpoints in the forward of the layer's outermost class. FSDP2 later gives the layer a new class,
    # so that the compiled forward would be an inner one, which never checkpoints.
    layer.gradient_checkpointing = False
    around: Callable[..., Any] = layer._gradient_checkpointing_func

    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(partial(compiled, **kwargs), *args) if layer.training else compiled(*args, **kwargs)

    return forward


def _so_far() -> Compiled:
    from torch._dynamo.utils import calculate_time_spent, counters

    return Compiled(calculate_time_spent().get("total_wall_time", 0.0), counters["stats"]["unique_graphs"])


def _check_compiler(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise InputError("compute.compile needs Triton on GPUs: pip install triton, or set compute.compile=false")
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError(
            "compute.compile needs a C++ compiler on CPUs, and none is found: install g++, or set compute.compile=false"
        ) from None
