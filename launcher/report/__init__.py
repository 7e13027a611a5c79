"""What a run did, as one HTML page that needs no network: read (`reading`), drawn (`curves`, `flow`, `given`, `facts`),
and put together (`page`). Needs no torch, no Ray and no model."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.report.page import PageSection, page
from launcher.report.reading import RunRecord
from launcher.report.sections import sections_of

__all__ = ["PageSection", "report"]


def report(runs: Sequence[RunRecord]) -> str:
    """The page of one run, or of several laid over each other. UsageError when the plots' library is missing."""
    return page(runs, sections_of(runs))
