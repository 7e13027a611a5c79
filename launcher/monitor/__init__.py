"""Reads a run from its storage: its status, progress and logs, and how its time was spent."""
