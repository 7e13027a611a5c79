"""The libraries that models are made of, imported in two thirds of the time.

Importing them is most of what a start costs: of each command that builds a model, and of each rank after each failure.
A third of it is in vain. Python's collector goes through all that has been imported so far, again and again. And
bitsandbytes has torch.compile wrap four functions when it is imported, for which torch imports its whole compiler; most
runs call none of them.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def load_libraries() -> None:
    """Before anything else that imports peft or bitsandbytes, both of which it imports; a second call does nothing."""
    if "peft" in sys.modules:
        return
    with _collector_resting():
        import torch

        with _compiling_late(torch):
            import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


@contextmanager
def _collector_resting() -> Iterator[None]:
    """What is imported stays, so that no later collection needs to look at it either."""
    resting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if resting:
            gc.enable()


@contextmanager
def _compiling_late(torch: Any) -> Iterator[None]:
    """torch.compile within the block compiles what it is given when that is first called."""
    compile_now = torch.compile
    torch.compile = functools.partial(_late, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _late(compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """As torch.compile, which is also a decorator's maker when it gets no function."""
    if function is None:
        return functools.partial(_late, compile_now, **settings)
    compiled = functools.cache(lambda: compile_now(function, **settings))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
