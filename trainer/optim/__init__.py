"""Optimizers and learning-rate schedules."""

from trainer.optim.optimizers import make_optimizer
from trainer.optim.schedules import learning_rate

__all__ = ["learning_rate", "make_optimizer"]
