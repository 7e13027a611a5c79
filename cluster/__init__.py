"""Where a job runs; imports neither torch nor ray."""
