"""torch.compile for each decoder layer by itself.

The layers are alike, so that one program serves all of them (the first one's input may need no gradient: a second), and
what strategies hang on a layer stays outside of it: hooks run around the compiled forward, as they do around the plain
one. So does gradient checkpointing, which runs the program again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from trainer.errors import InputError
from trainer.strategies.layers import decoder_layers

BACKEND = "inductor"
MOST_PROGRAMS = 64
"""Per forward function. A layer has a few: with gradients and without, one pack and several, the first layer's. Beyond
torch's own limit of 8 it would go on uncompiled, with no more than a warning."""


class Compiled(NamedTuple):
    """What a process has spent, and the programs that came of it."""

    seconds: float
    programs: int


class Warmup:
    """Tells what compiling has taken since it was asked last."""

    def __init__(self, compiles: bool) -> None:
        self._before = _so_far() if compiles else None

    def taken(self) -> Compiled | None:
        """None when nothing was compiled meanwhile."""
        if self._before is None:
            return None
        now, before = _so_far(), self._before
        self._before = now
        taken = Compiled(now.seconds - before.seconds, now.programs - before.programs)
        return taken if taken.programs else None


def compile_layers(model: torch.nn.Module, device: torch.device) -> int:
    """Before the strategy wraps them. Nothing is compiled yet: the first steps do that, forward and backward. Returns
    how many layers there are. Raises InputError without a compiler for ``device``."""
    if BACKEND == "inductor":
        _check_compiler(device)
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_PROGRAMS)
    layers: list[Any] = decoder_layers(model)
    for layer in layers:
        # Sizes are symbols from the start: else the lengths that came first would decide which program later ones run.
        layer.forward = _checkpointed(layer, torch.compile(layer.forward, dynamic=True, backend=BACKEND))
    return len(layers)


def _checkpointed(layer: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """transformers checkpoints inside a layer's forward, in the outermost class that has one: of the class that FSDP2
    makes of a layer afterwards, the forward that was compiled would be an inner one, and never checkpoint."""
    if not getattr(layer, "gradient_checkpointing", False):
        return compiled
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
