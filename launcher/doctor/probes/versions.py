"""Versions of the software that must be the same on all ranks."""

from __future__ import annotations

from trainer.run.frozen import provenance


def versions() -> dict[str, str | None]:
    """Returns versions by name: Python, muster with its commit, and the run's packages; None: not installed."""
    found = provenance()
    return {"python": found["python"], "muster": found["muster"], **found["packages"]}
