"""Texts that the model in training generates: samples before and after it, and answers that evaluations score."""
