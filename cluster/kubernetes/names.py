"""Names that Kubernetes takes, made from names of runs."""

from __future__ import annotations

import hashlib
import re

RAYJOB_LENGTH = 47
"""KubeRay's limit: it appends 6 characters for the RayCluster, and more for the pods."""

JOBSET_LENGTH = 40
"""Leaves room for `-node-0-<index>-<5 random>` in a pod's name and host name of at most 63 characters."""

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_HASHED = re.compile(r".*-[0-9a-f]{10}")


def fitted(name: str, length: int) -> str:
    """``name`` as a DNS label (RFC 1035: a letter first) of at most ``length`` characters.

    A name that does not fit is shortened and gets a hash of the whole, so that two names never become one. A name that
    already looks like a result of this function gets a hash too."""
    if _LABEL.fullmatch(name) and len(name) <= length and not _HASHED.fullmatch(name):
        return name
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not stem[:1].isalpha():
        stem = f"run-{stem}".rstrip("-")
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{stem[: length - len(mark) - 1].rstrip('-')}-{mark}"
