"""What the processes of a Ray cluster's head need in their environment for muster to notice a lost node in seconds."""

NODE_SETTINGS: dict[str, str] = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
