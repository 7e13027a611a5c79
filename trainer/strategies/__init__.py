"""Strategies: how one model is distributed over the ranks."""

from trainer.strategies.base import Strategy, make_strategy

__all__ = ["Strategy", "make_strategy"]
