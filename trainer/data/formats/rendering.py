"""A chat template rendered: a program of somebody else's, in a sandbox, with bounds.

transformers renders templates in Jinja's sandbox, which keeps them from Python's objects and from long ranges, but not
from loops in loops or from strings of any length. So a template has a bounded time of the processor, memory and length.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

CPU_S = 20.0
"""For one conversation, which takes milliseconds; of this process, so that a busy machine takes nothing off it."""
MEMORY_BYTES = 2**29
LONGEST = 2**24
"""Characters of one conversation."""
LONGEST_CAUSE = 300


class Unrendered(Exception):
    """The template refuses the conversation, or does not come to an end; ``str`` says why."""


def render(tokenizer: Any, turns: list[Any], template: str | None = None, **how: Any) -> str:
    """The conversation's text by ``template``, or the tokenizer's own. Raises Unrendered, whatever goes wrong."""
    try:
        with _bounded_memory(), _bounded_time():
            text = str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **how))
    except _OutOfTime:
        raise Unrendered(f"it has taken {CPU_S:g} s of the processor; does it loop?") from None
    except MemoryError:
        raise Unrendered(f"it takes more than {MEMORY_BYTES / 2**20:.0f} MiB of memory") from None
    except Exception as error:  # of a program that nobody here has written
        said = " ".join(str(error).split())[:LONGEST_CAUSE]
        raise Unrendered(said or type(error).__name__) from error
    if len(text) > LONGEST:
        raise Unrendered(f"it makes a text of {len(text):,} characters, and {LONGEST:,} are read at most")
    return text


class _OutOfTime(BaseException):
    """Nothing on the way may take it for an error of its own."""


@contextmanager
def _bounded_time() -> Iterator[None]:
    """In the main thread, which alone hears signals: preparation and conversations run there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before if before is not None else signal.SIG_DFL)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Where the kernel tells what the process has (Linux)."""
    try:
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    least = min(limit for limit in (held + MEMORY_BYTES, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
