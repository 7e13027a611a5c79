"""Strategies: how one model is distributed over the ranks."""

from trainer.strategies.base import Strategy, make_strategy, strategy_class

__all__ = ["Strategy", "make_strategy", "strategy_class"]
