"""The progress of a run in words, read from its storage: what is shown is what is stored."""
