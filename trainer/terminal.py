"""Makes texts safe for a terminal: nothing in a row, an event or a host's name acts on it, and no credential is
shown."""

from __future__ import annotations

import logging
import re

from trainer.redact import redact

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"

_REPLACEMENT = 0xFFFD
_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_LINE_ENDS = (0x2028, 0x2029)
_SURROGATES = range(0xD800, 0xE000)  # they cannot be written in any encoding
# Each is replaced by one character, so that columns keep their computed widths.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *_BIDIRECTIONAL, *_LINE_ENDS, *_SURROGATES), _REPLACEMENT),
}

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_HARMLESS = re.compile(rf"({COLOUR.pattern}|\r)")


def neutralise(text: str) -> str:
    """Replaces control characters (except line feed and tab), and characters that change the direction of writing, by
    visible substitutes such as ``␛``. Works on any piece of a text independently."""
    return text.translate(_VISIBLE)


def neutralise_output(text: str) -> str:
    """Neutralises libraries' output to a terminal, but keeps colours and the carriage returns of progress bars."""
    parts = _HARMLESS.split(text)
    return "".join(part if i % 2 else neutralise(part) for i, part in enumerate(parts))


def shown(text: str) -> str:
    """Returns a text as it may be shown to a person: without credentials and control characters."""
    return neutralise(redact(text))


class ShownFormatter(logging.Formatter):
    """Formats warnings and their stacks by `shown`."""

    def __init__(self) -> None:
        super().__init__(LOG_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))
