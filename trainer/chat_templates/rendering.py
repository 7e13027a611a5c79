"""Renders a chat template: untrusted code, in a sandbox, with limits.

transformers renders templates in Jinja's sandbox. The sandbox blocks access to Python's objects and long ranges, but
not nested loops or strings of any length. So the CPU time, the memory and the length of the text are limited here.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from trainer.bounds import OutOfTime, bounded_cpu, bounded_memory

CPU_S = 20.0
"""CPU time for one conversation, which usually takes milliseconds."""
MEMORY_BYTES = 2**29
LONGEST = 2**24
"""The most characters of one conversation."""
LONGEST_CAUSE = 300


class Unrendered(Exception):
    """The template rejects the conversation, or exceeds a limit. ``str`` is the reason."""


def render(tokenizer: Any, turns: list[Any], template: str | None = None, **how: Any) -> str:
    """Returns the text of a conversation, by ``template`` or the tokenizer's own. Raises Unrendered for every error."""
    try:
        with bounded_memory(MEMORY_BYTES), bounded_cpu(CPU_S):
            text = str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **how))
    except OutOfTime:
        raise Unrendered(f"it has used {CPU_S:g} s of CPU time; it may contain an endless loop") from None
    except MemoryError:
        raise Unrendered(f"it takes more than {MEMORY_BYTES / 2**20:.0f} MiB of memory") from None
    except Exception as error:  # untrusted code may raise anything
        cause = " ".join(str(error).split())[:LONGEST_CAUSE]
        raise Unrendered(cause or type(error).__name__) from error
    if len(text) > LONGEST:
        raise Unrendered(f"it makes a text of {len(text):,} characters; the limit is {LONGEST:,}")
    return text


_DIRECTIVES = (*"aAbBcCdDeFgGhHIjklmMnpPrRSTtuUVwWxXyYzZ", "-d", "-e", "-m", "-H", "-I", "-j", "-M", "-S", "-y", "%")


def writes_date(template: str | None) -> bool:
    """Returns True for a template that writes the date of its rendering."""
    return "strftime_now" in (template or "")


def at_date(template: str, date: datetime) -> str:
    """Returns the template with the date frozen: a macro of its own hides transformers' function."""
    replaced = "".join(f" | replace('%{one}', '{date.strftime('%' + one)}')" for one in _DIRECTIVES)
    return f"{{%- macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"
