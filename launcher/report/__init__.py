"""A report on runs as one HTML page that needs no network.

`reading` reads the runs; `head`, `metric_charts`, `timeline_charts`, `data_charts` and `tables` draw them; `sections`
and `page` build the page. It needs no torch, no Ray and no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.report.head import head_of
from launcher.report.page import page
from launcher.report.reading import RunRecord
from launcher.report.sections import groups_of

__all__ = ["report"]


def report(runs: Sequence[RunRecord]) -> str:
    """Returns the page of one run, or of several in the same plots. Raises UsageError if plotly is missing."""
    return page(head_of(runs), groups_of(runs))
