"""The arguments that every node of a Ray cluster is started with."""

from __future__ import annotations

NODE_SETTINGS: dict[str, str] = {
    # A node that stops answering is given up after 3 to 6 s; with Ray's own settings that takes half a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""Environment of `ray start`, on the head and on every worker node."""
