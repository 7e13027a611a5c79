"""A report on runs as one HTML page that needs no network.

`reading` reads the runs; `metric_charts`, `timeline_charts`, `data_charts` and `tables` draw them; `sections` and
`page` build the page. It needs no torch, no Ray and no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.report.page import PageSection, page
from launcher.report.reading import RunRecord
from launcher.report.sections import sections_of

__all__ = ["PageSection", "report"]


def report(runs: Sequence[RunRecord]) -> str:
    """Returns the page of one run, or of several in the same plots. Raises UsageError if plotly is missing."""
    return page(runs, sections_of(runs))
