"""Kubernetes' notation for amounts of memory.

https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
"""

from __future__ import annotations

import re
from fractions import Fraction

from cluster.job import ClusterError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18} | {
    f"{letter}i": 2 ** (10 * power) for power, letter in enumerate("KMGTPE", start=1)
}
_SHAPE = re.compile(
    rf"(\d+(?:\.\d*)?|\.\d+)({'|'.join(sorted(filter(None, _UNITS), key=len, reverse=True))})?", re.ASCII
)


def to_bytes(quantity: str, setting: str) -> int:
    """Returns ``16Gi`` as bytes. Raises ClusterError with the name of the ``setting``."""
    found = _SHAPE.fullmatch(quantity)
    size = int(Fraction(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size <= 0:
        raise ClusterError(f"{setting} is {quantity!r}, which is no amount of memory; write e.g. 16Gi or 500M")
    return size


def from_bytes(size: int) -> str:
    """Returns the amount in the largest binary unit that holds it exactly."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)
