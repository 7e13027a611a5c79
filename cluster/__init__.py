"""Where a job runs. Imports neither torch nor Ray."""
