"""Reads a run from its storage: status, progress, logs and where its time went."""
