"""Sweeps: how trials are chosen and stopped, and the recipe of each."""
