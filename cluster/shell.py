"""Texts in commands for a shell."""

from __future__ import annotations

END = "END_OF_TEXT"


def written(file: str, text: str) -> str:
    """Returns the command that writes a text, and a line break, into ``file``, a word of the shell. The text may hold
    anything: the shell expands nothing in it."""
    end = END
    while end in text:
        end += "_"
    return f"cat >{file} <<'{end}'\n{text.rstrip()}\n{end}"
