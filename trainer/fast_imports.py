"""Imports torch, transformers, peft and bitsandbytes in two thirds of the usual time.

These imports are most of the cost of a start: of each command that builds a model, and of each rank after each failure.
A third of that time has no use. Python's garbage collector scans all that has been imported so far, again and again.
And bitsandbytes, when it is imported, wraps four functions by torch.compile, for which torch imports its entire
compiler; most runs call none of the four.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

KERNELS_MISSED = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers that warn, when a library is imported, of kernels that nothing here calls, and of the library itself."""


def mute_libraries() -> None:
    """Keeps the warnings of imports out of the log. Call it before the first import of transformers."""
    for name in KERNELS_MISSED:
        logging.getLogger(name).setLevel(logging.ERROR)


def load_libraries() -> None:
    """Imports the libraries. Call it before any other import of peft or bitsandbytes; a second call does nothing."""
    # DeepSpeed, which peft and accelerate look for, writes to stdout that a machine without a GPU has none.
    logging.getLogger("DeepSpeed").addFilter(_says_more)
    if "peft" in sys.modules:
        return
    mute_libraries()
    with _collector_resting():
        import torch

        with _compiling_late(torch):
            import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def _says_more(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")


@contextmanager
def _collector_resting() -> Iterator[None]:
    """Disables the garbage collector within the block."""
    resting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # imported modules stay, so later collections need not scan them either
        if resting:
            gc.enable()


@contextmanager
def _compiling_late(torch: Any) -> Iterator[None]:
    """Defers, within the block, each torch.compile of a function to the first call of that function."""
    compile_now = torch.compile
    torch.compile = functools.partial(_late, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _late(compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **settings: Any) -> Any:
    if function is None:  # torch.compile(**settings) returns a decorator
        return functools.partial(_late, compile_now, **settings)
    compiled = functools.cache(lambda: compile_now(function, **settings))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
