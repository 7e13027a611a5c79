"""Versions of everything that must be the same on all ranks."""

from __future__ import annotations

from trainer.run.frozen import provenance


def versions() -> dict[str, str | None]:
    """By name: Python, muster with its code's commit, and the packages that a run depends on; None: not installed."""
    found = provenance()
    return {"python": found["python"], "muster": found["muster"], **found["packages"]}
