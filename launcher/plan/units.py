"""Sizes of memory and bandwidths, as people write them."""

from __future__ import annotations

import re

from trainer.errors import UsageError

UNITS = {"": 1, **{f"{p}{end}": 1000**n for n, p in enumerate("KMGT", 1) for end in ("", "B")}}
UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)} | {"B": 1}


def size(text: str) -> int:
    """Returns the bytes that a text such as ``24GiB``, ``80GB``, ``64G`` or a plain number names. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UsageError(f"{text!r} is not a size of memory; write it as 24GiB or 80GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def bandwidths(text: str) -> tuple[float, float]:
    """Returns bytes per second within a replica and between replicas, of one text such as ``25GB/s`` or ``200Gbit/s``
    or two with a comma. Raises UsageError."""
    found = [_bandwidth(one) for one in text.split(",")]
    if len(found) > 2:
        raise UsageError(f"{text!r} has {len(found)} bandwidths; write one, or two: in a replica and between them")
    return found[0], found[-1]


def _bandwidth(text: str) -> float:
    value, slash, second = text.strip().partition("/")
    bits = value.lower().removesuffix("s").endswith(("bit", "bits"))
    try:
        rate = size(re.sub(r"(?i)bits?$", "", value)) / (8 if bits else 1)
    except UsageError:
        rate = 0.0
    if not rate or (slash and second.strip().lower() != "s"):
        raise UsageError(f"{text!r} is not a bandwidth; write it as 25GB/s or 200Gbit/s")
    return rate
