"""Experiment trackers: each shows the metrics that a run has stored. See `trainer.tracking.mirror`."""

from trainer.tracking.base import Point, TrackedRun, Tracker, Watermark, check_trackers
from trainer.tracking.mirror import Mirror, send_all, tracked

__all__ = ["Mirror", "Point", "TrackedRun", "Tracker", "Watermark", "check_trackers", "send_all", "tracked"]
