"""Makes texts fit for a person's screen: nothing in a row, an event or a host's name acts on the terminal, and no
credential is shown."""

from __future__ import annotations

import logging
import re

from trainer.redact import redact

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"

_REPLACEMENT = 0xFFFD
_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_LINE_ENDS = (0x2028, 0x2029)
_SURROGATES = range(0xD800, 0xE000)  # they cannot be written in any encoding
# One character for one, so that columns stay as wide as they were reckoned.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *_BIDIRECTIONAL, *_LINE_ENDS, *_SURROGATES), _REPLACEMENT),
}

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_HARMLESS = re.compile(rf"({COLOUR.pattern}|\r)")


def neutralise(text: str) -> str:
    """Replaces control characters (but line feed and tab), and characters that change the direction of writing, by
    characters that only show that they were there: ``␛``. Works for any piece of a text by itself."""
    return text.translate(_VISIBLE)


def neutralise_output(text: str) -> str:
    """Neutralises what libraries write to a terminal, where colours and the carriage returns of progress bars stay."""
    parts = _HARMLESS.split(text)
    return "".join(part if i % 2 else neutralise(part) for i, part in enumerate(parts))


def shown(text: str) -> str:
    """Returns a text as a person is shown it: without credentials and control characters."""
    return neutralise(redact(text))


class ShownFormatter(logging.Formatter):
    """Formats warnings and their stacks as they are `shown`."""

    def __init__(self) -> None:
        super().__init__(LOG_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))
