"""Writes a manifest as YAML that every reader, YAML 1.1 (PyYAML, kubectl) or 1.2, reads as the same data.

YAML 1.1 reads a bare `y`, `on`, `1e3`, `0x10`, `1:30` or `null` as something else than text, and writers differ in what
they quote. So every text is quoted or a literal block; only keys that can be nothing but text are bare.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import yaml

_BARE_KEY = re.compile(r"[a-z][A-Za-z]{2,}")
_NO_WORDS = frozenset({"true", "false", "null", "yes", "off", "none", "nan", "inf"})


class _Text(str):
    """A value, or a key that must be quoted."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: _Text) -> yaml.ScalarNode:
    # The emitter itself falls back to quotes where a block would not give back the same characters.
    block = "\n" in text.rstrip("\n") and "\r" not in text
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|" if block else '"')


_Dumper.add_representer(_Text, _text)


def _marked(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key(key): _marked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item) for item in value]
    return _text_of(value) if isinstance(value, str) else value


def _text_of(value: str) -> _Text:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"cannot hold the text {value[:60]!r}: {error.reason}") from None
    return _Text(value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) and key not in _NO_WORDS else _text_of(key)


def emit(manifest: dict[str, Any]) -> str:
    """One YAML document. Raises ValueError for a text that YAML cannot hold (a lone surrogate)."""
    text: str = yaml.dump(_marked(manifest), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    assert yaml.safe_load(text) == manifest, "the manifest does not read back as it was written"
    return text
