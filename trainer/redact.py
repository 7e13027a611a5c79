"""Finds credentials in texts. A recipe with a credential is refused; all other text is shown and stored without it.

A credential is recognised by its place (before ``@`` in a URL, in a signed query, after a name such as ``api_key``), by
its shape (keys with a known prefix, PEM blocks), or by its value, where the environment has it under such a name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"

_KEY = (
    r"(?:api|access|secret|private|account|auth|encryption|signing|shared(?:access)?|storage|master|service|license"
    r"|subscription)[_-]?key(?:[_-]?id)?"
)
# Tokens of a vocabulary, and counts of them, are no credentials.
_VOCABULARY = (
    r"(?:bos|eos|eod|eot|pad|unk|sep|cls|mask|image|video|audio|stop|start|end|begin|special|extra|max|min|num|per|next|"
    r"first|last|new|target|total|decoder|forced)"
)
_NAME = (
    rf"(?![\w-]*{_VOCABULARY}[_-]?token(?![\w-]))[\w-]*?(?:{_KEY}|secret|passw(?:or)?d|passphrase|token|credentials?)"
)
_QUOTED = r"""\\"[^"\\\n]*\\"|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'"""

USER = re.compile(
    r"""(?<=://)(?<!hf://)(?:[^/\s"'<>]{0,256}@|[^/\s@"'<>]{0,256}:(?!\d+(?:[/?#]|$))[^\s"'<>]{0,256}@)"""
)
"""``user@`` or ``user:password@`` after a URL's scheme, where the password may hold a slash. A port is no password, and
``hf://set@main`` is a revision."""

QUERY = re.compile(
    rf"(?P<name>(?:[?&#;]|%3F|%26)(?:x-(?:amz|goog)-[\w-]+|AWSAccessKeyId|GoogleAccessId|key|sig|signature|auth|jwt|"
    rf"{_NAME})(?:=|%3D))(?P<value>[^&\s\"'<>;]+)",
    re.IGNORECASE,
)
"""A parameter of a signed or otherwise secret query."""

PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----"
    r"(?:\\+[nr]|[A-Za-z0-9+/=\s])*"
    r"(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----)?"
)

SHAPES = {
    "a private key": PRIVATE_KEY,
    "an access key of AWS": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a token of the Hugging Face Hub": re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"),
    "a key of W&B": re.compile(r"\bwandb_v\d_[A-Za-z0-9_]{20,}\b"),
    "a token of GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})\b"),
    "a key of Google": re.compile(r"\bAIza[\w-]{35}|\bya29\.[\w-]{20,}"),
    "an API key": re.compile(r"(?<![\w-])sk-(?:proj-|ant-[a-z0-9]+-)?[A-Za-z0-9_]{20,}"),
    "a web token": re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"),
    "a header's token": re.compile(r"\b(?:Bearer|Basic)\s+(?=[^\s\"']*\d)[\w.~+/-]{16,}=*", re.IGNORECASE),
}
"""Patterns of keys with a known form, each under its description."""

_VARIABLE = re.compile(r"\b([A-Z0-9_]*(?:KEY|SECRET|TOKEN|PASSW(?:OR)?D|PASSPHRASE|CREDENTIALS?))=[^\s/,;$]{8,}")
"""A variable that is passed to a program: ``--export=WANDB_API_KEY=…``."""

_HINT = re.compile(
    r"(?:key(?:[_-]?id)?|secret|passw(?:or)?d|passphrase|token|credentials?|authorization|cookie)\\*[\"']?\s*[:=]",
    re.IGNORECASE,
)
_HEADER = re.compile(r"((?:authorization|cookie)\\*[\"']?\s*[:=]\s*\\*[\"']?)[^\s\"'\\][^\n\"'\\]*", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?<![\w-])((?:--?)?{_NAME}(?:=>|=))(?:(?!none\b|null\b|true\b|false\b|[$%{{]))({_QUOTED}|[^\s,;&\"'<>)\]}}\\]+)",
    re.IGNORECASE,
)
# Without quotes only where nothing follows, or where it looks like a key: "token: unknown key; …" is a sentence.
_FIELD = re.compile(
    rf"(?<![\w.-])(\\*[\"']?{_NAME}\\*[\"']?\s*:\s*)"
    rf"({_QUOTED}|(?!none\b|null\b|true\b|false\b)[^\s,;\"'{{}}\[\]]+(?=\s*(?:$|[,;}}\]]))|(?=[^\s\d]*\d)[^\s,;\"'{{}}\[\]]{{8,}})",
    re.IGNORECASE | re.MULTILINE,
)
_FIELD_NAME = re.compile(rf"{_NAME}", re.IGNORECASE)

_SECRET_VARIABLE = re.compile(r"KEY|SECRET|TOKEN|PASSW(OR)?D|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
_PLACE_VARIABLE = re.compile(r"_(FILE|PATH|DIR)$", re.IGNORECASE)
_ADDRESS_VARIABLE = re.compile(r"(^|_)(UR[IL]|DSN|PROXY|ENDPOINT|ADDRESS)(_|$)", re.IGNORECASE)
_USER_WITHOUT_SCHEME = re.compile(r"^(?![\w+.-]+://)([^\s/@:]+:(?!\d+(?:/|$))\S*)@")
_SHORTEST_SECRET = 8
_SHORTEST_REFUSED = 16  # a recipe may contain a shorter value of the environment by chance


class Redactor:
    """Replaces credentials in texts by ``***``, including those in ``environment``."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        found = secrets_of(environment)
        self._values = re.compile("|".join(map(re.escape, found))) if found else None

    def text(self, text: str) -> str:
        text = PRIVATE_KEY.sub(HIDDEN, text)  # first, as one block: the environment may contain its single lines
        if self._values is not None:
            text = self._values.sub(HIDDEN, text)
        for shape in SHAPES.values():
            text = shape.sub(HIDDEN, text)
        text = QUERY.sub(rf"\g<name>{HIDDEN}", USER.sub(f"{HIDDEN}@", text))
        if _HINT.search(text) is None:  # the patterns of names are slow, and few lines have one
            return text
        lines = text.splitlines(keepends=True)
        return "".join(_without_fields(line) if _HINT.search(line) else line for line in lines)

    def clean(self, value: Any) -> Any:
        """Redacts all strings of a JSON value, including its keys, and every text under the name of a credential."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                self.text(k) if isinstance(k, str) else k: HIDDEN if _is_secret_field(k, v) else self.clean(v)
                for k, v in value.items()
            }
        return [self.clean(item) for item in value] if isinstance(value, (list, tuple)) else value


class RedactedLines:
    """Redacts a stream of bytes, passed in complete lines. A private key's block may extend over several calls."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._inside = False

    def __call__(self, lines: bytes) -> bytes:
        text = lines.decode("utf-8", "surrogateescape")
        if self._inside:
            rest = _REST_OF_KEY.match(text)
            assert rest is not None
            self._inside = rest.end() == len(text) and rest[1] is None
            text = text[rest.end() :]
        *_, last = [None, *PRIVATE_KEY.finditer(text)]
        if last is not None and last.end() == len(text) and "-----END" not in last[0]:
            self._inside = True
        return self._redactor.text(text).encode("utf-8", "surrogateescape")


_REST_OF_KEY = re.compile(
    r"(?:[A-Za-z0-9+/=]{16,}\s*\n|[A-Za-z0-9+/=]+={0,2}\s*\n(?=-----END))*(-----END [A-Z0-9 ]*PRIVATE KEY-----)?"
)


def redact(text: str) -> str:
    """Returns the text without credentials, including those of this process's environment."""
    return redactor().text(text)


def clean(value: Any) -> Any:
    """Redacts all strings of a JSON value."""
    return redactor().clean(value)


def redactor() -> Redactor:
    """Returns the redactor for the environment as it is now."""
    return _redactor(tuple(os.environ.items()))


@lru_cache(maxsize=4)
def _redactor(environment: tuple[tuple[str, str], ...]) -> Redactor:
    return Redactor(dict(environment))


def credential_in(text: str) -> str | None:
    """Returns the kind of credential that a text contains, without repeating it; None if it contains none."""
    if USER.search(text):
        return "user:password@…"
    if found := QUERY.search(text):
        return f"{found['name'][1:-1]}=… in a query"
    if found := _VARIABLE.search(text):
        return f"{found[1]}=…"
    for what, shape in SHAPES.items():
        if shape.search(text):
            return what
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_REFUSED and value in text and value in _secrets_in(name, value):
            return f"the value of the environment's {name}"
    return None


def secrets_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the values of variables that by their names contain credentials, and those in addresses, the longest
    first; also in their URL and JSON encodings. Paths of files are not secrets."""
    found = {secret for name, value in environment.items() for secret in _secrets_in(name, value)}
    found |= {form for secret in found for form in (quote(secret, safe=""), json.dumps(secret)[1:-1])}
    return tuple(sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=lambda s: (-len(s), s)))


def _secrets_in(name: str, value: str) -> Iterator[str]:
    if _SECRET_VARIABLE.search(name) and not _PLACE_VARIABLE.search(name) and not _is_place(value):
        yield value
        yield from (line for line in value.splitlines() if len(line) >= _SHORTEST_REFUSED)
    users = [found[0][:-1] for found in USER.finditer(value)]
    if _ADDRESS_VARIABLE.search(name) and (found := _USER_WITHOUT_SCHEME.match(value)):
        users.append(found[1])
    for user in users:
        password = user.partition(":")[2]
        yield from (user, password, unquote(password))
    yield from (found["value"] for found in QUERY.finditer(value))


def _is_place(value: str) -> bool:
    return value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))


def _is_secret_field(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, str) and _FIELD_NAME.fullmatch(name) is not None


def _without_fields(line: str) -> str:
    line = _HEADER.sub(rf"\g<1>{HIDDEN}", line)
    return _FIELD.sub(_hidden, _ASSIGNED.sub(_hidden, line))


def _hidden(found: re.Match[str]) -> str:
    """Keeps the name and the quotes around the value."""
    quotes = re.match(r"\\?[\"']", found[2])
    mark = quotes[0] if quotes else ""
    return f"{found[1]}{mark}{HIDDEN}{mark}"
