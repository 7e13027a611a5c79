"""The process group of a run."""
