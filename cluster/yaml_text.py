"""Manifests and tasks as YAML, which every reader takes for the same values."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from cluster.job import ClusterError


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as a block, and quotes a text that some reader of YAML takes for another type."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    text.encode()  # raises for half of a surrogate pair, which PyYAML writes and kubectl does not read
    block = "\n" in text.rstrip("\n") and text.replace("\n", "").isprintable()
    style = "|" if block else None if text.isprintable() else '"'  # only double quotes keep other line breaks
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
# PyYAML quotes what it would not read as text itself; to kubectl, `y` is a truth value and `1e3` a number as well.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\.?[0-9]|[yYnN]$"), list("-+.0123456789yYnN")
)


def to_yaml(made: Mapping[str, Any]) -> str:
    """Returns one YAML document. Raises ClusterError for a text that YAML cannot hold."""
    try:
        text: str = yaml.dump(made, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    except UnicodeEncodeError as error:
        raise ClusterError(f"YAML cannot hold the text {error.object[:60]!r}: {error.reason}") from None
    return text
