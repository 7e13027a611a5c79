"""Preparation: raw inputs are cut into windows, encoded once, and stored."""
