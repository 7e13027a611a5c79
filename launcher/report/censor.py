"""Keeps credentials out of a page that is made to be passed on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.logs.parts import secrets_of

HIDDEN = "***"

_NAMES = r"(?:[\w-]*[_-])?(?:api_?key|key|secret|password|passwd|token|credentials?)"
_SETTING = re.compile(rf"^(\s*(?:- )?[\"']?{_NAMES}[\"']?\s*:\s+)(\S.*)$", re.IGNORECASE | re.MULTILINE)
_INLINE = re.compile(rf"([{{,]\s*[\"']?{_NAMES}[\"']?\s*:\s+)([^,}}\n]+)", re.IGNORECASE)
_USER = re.compile(r"(\w://)[^/\s@]+@")
_QUERY = re.compile(
    r"([?&](?:x-(?:amz|goog)-[\w-]+|sig|signature|sv|se|sp|token|key|secret|password)=)[^&\s\"']+", re.I
)
_FIELD = re.compile(rf"^{_NAMES}$", re.IGNORECASE)


class Censor:
    """Replaces what a text says after names of credentials, in URLs before ``@`` and in signed queries, and the values
    that the environment holds under such names."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._secrets = [secret.decode() for secret in secrets_of(environment)]

    def text(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        text = _INLINE.sub(rf"\g<1>{HIDDEN}", _SETTING.sub(rf"\g<1>{HIDDEN}", text))
        return _QUERY.sub(rf"\g<1>{HIDDEN}", _USER.sub(rf"\g<1>{HIDDEN}@", text))

    def clean(self, value: Any) -> Any:
        """The same for all strings of a value that JSON has."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {k: HIDDEN if _FIELD.match(k) and isinstance(v, str) else self.clean(v) for k, v in value.items()}
        return [self.clean(item) for item in value] if isinstance(value, (list, tuple)) else value
