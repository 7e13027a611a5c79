"""The process group of a run, and the nodes of its ranks."""
