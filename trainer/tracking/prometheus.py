"""Prometheus: the driver serves the newest step's metrics over HTTP.

The metrics show the present state of the run. Prometheus itself keeps the values that it has scraped.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from trainer.recipe import Recipe
from trainer.tracking.base import START, TRAIN, Point, TrackedRun, Watermark

log = logging.getLogger(__name__)

COUNTED = ("tokens", "target_tokens")
"""Sums over the steps of the run; the rest are gauges of the newest step."""

_CLOSE_S = 5.0


class Prometheus:
    """The Prometheus endpoint of one run; see `trainer.tracking.base.Tracker`."""

    def __init__(self, curve: TrackedRun) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        section = curve.recipe.prometheus
        self._run = curve.recipe.name
        self._registry, self._metrics = CollectorRegistry(), {}  # type: tuple[Any, dict[str, Any]]
        self._server, self._thread = start_http_server(section.port, section.address, self._registry)
        self.port = int(self._server.server_port)
        log.log(
            logging.WARNING if section.port == 0 else logging.INFO,
            "metrics for Prometheus at http://%s:%d/metrics",
            section.address,
            self.port,
        )

    @staticmethod
    def check(recipe: Recipe) -> None:
        return None

    def last_mark(self) -> Watermark:
        """Returns the start: each driver sends all points of the run again, so that the counters cover the run."""
        return START

    def write(self, points: Sequence[Point]) -> None:
        from prometheus_client import Counter

        for point in points:
            if point.part == TRAIN:
                self._gauge("step", "steps done").set(point.step)
                self._gauge("total_steps", "steps of the whole run").set(point.total_steps)
                self._gauge("last_step_timestamp_seconds", "unix time of the last step").set(point.time)
            for name, value in point.values.items():
                if point.part == TRAIN and name in COUNTED:
                    self._made(Counter, name, f"{name} that the run has trained on").inc(value)
                else:
                    shown = name if point.part == TRAIN else f"eval_{name}"
                    self._gauge(shown, f"{shown} as in the run's metrics").set(value)

    def close(self, state: str) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_CLOSE_S)

    def _gauge(self, name: str, text: str) -> Any:
        from prometheus_client import Gauge

        return self._made(Gauge, name, text)

    def _made(self, kind: Any, name: str, text: str) -> Any:
        full = "muster_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        if full not in self._metrics:
            self._metrics[full] = kind(full, text, ["run"], registry=self._registry)
        return self._metrics[full].labels(run=self._run)
