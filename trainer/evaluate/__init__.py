"""What a run, an adapter or a model scores on a recipe's evaluation data, in this process."""

from trainer.evaluate.scores import evaluate
from trainer.evaluate.subject import Address

__all__ = ["Address", "evaluate"]
