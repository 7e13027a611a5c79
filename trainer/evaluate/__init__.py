"""Evaluation of a run, an adapter or a model on a recipe's evaluation data, in this process."""

from trainer.evaluate.scores import evaluate

__all__ = ["evaluate"]
