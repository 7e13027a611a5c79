"""A chat template rendered: a program of somebody else's, in a sandbox, with bounds.

transformers renders templates in Jinja's sandbox, which keeps them from Python's objects and from long ranges, but not
from loops in loops or from strings of any length. So a template has a bounded time of the processor, memory and length.
"""

from __future__ import annotations

from typing import Any

from trainer.bounds import OutOfTime, bounded_cpu, bounded_memory

CPU_S = 20.0
"""For one conversation, which takes milliseconds."""
MEMORY_BYTES = 2**29
LONGEST = 2**24
"""Characters of one conversation."""
LONGEST_CAUSE = 300


class Unrendered(Exception):
    """The template refuses the conversation, or does not come to an end; ``str`` says why."""


def render(tokenizer: Any, turns: list[Any], template: str | None = None, **how: Any) -> str:
    """The conversation's text by ``template``, or the tokenizer's own. Raises Unrendered, whatever goes wrong."""
    try:
        with bounded_memory(MEMORY_BYTES), bounded_cpu(CPU_S):
            text = str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **how))
    except OutOfTime:
        raise Unrendered(f"it has taken {CPU_S:g} s of the processor; does it loop?") from None
    except MemoryError:
        raise Unrendered(f"it takes more than {MEMORY_BYTES / 2**20:.0f} MiB of memory") from None
    except Exception as error:  # of a program that nobody here has written
        said = " ".join(str(error).split())[:LONGEST_CAUSE]
        raise Unrendered(said or type(error).__name__) from error
    if len(text) > LONGEST:
        raise Unrendered(f"it makes a text of {len(text):,} characters, and {LONGEST:,} are read at most")
    return text
