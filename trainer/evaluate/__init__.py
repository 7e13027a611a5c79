"""Evaluation of a run, an adapter or a model in this process: on a recipe's evaluation data, or by the tasks of
lm-evaluation-harness."""

from trainer.evaluate.harness import HarnessTasks, evaluate_tasks
from trainer.evaluate.scores import evaluate

__all__ = ["HarnessTasks", "evaluate", "evaluate_tasks"]
