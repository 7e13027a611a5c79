"""A training loop in this process, whose parts and metrics a test can look at."""

from launcher.testing.bench import Bench, bench

__all__ = ["Bench", "bench"]
