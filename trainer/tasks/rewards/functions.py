"""Rewards and scores of texts, computed by Python functions that the recipe names, in processes of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from trainer.errors import RewardFailed
from trainer.recipe.sections.rollouts.reward import RewardFunctionSection
from trainer.tasks.rewards import process
from trainer.tasks.rewards.children import GRACE_S, Children, death


class RewardFunctions:
    """Calls functions in ``processes`` spawned processes, and checks their results. Each process loads all of them
    once. ``setting``: the key of the recipe in messages.

    The processes end with `close`, and with this process, however that ends. A failure ends them too. Thread-safe."""

    def __init__(
        self, rows: Sequence[RewardFunctionSection], processes: int = 1, setting: str = "ppo.reward.function"
    ) -> None:
        """Raises InputError for a function that cannot be loaded."""
        self.rows = tuple(rows)
        specs = tuple(dict.fromkeys(row.function for row in rows))
        self._children = Children(specs, setting, "reward functions", each=processes)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]
    ) -> dict[str, list[float]]:
        """Returns a number for each completion, by the names of the functions, which run at the same time. Raises
        RewardFailed, which is not retried, if one of them fails or takes longer than its time."""
        if not completions:
            return {row.label: [] for row in self.rows}
        texts = [*prompts], [*completions], [*references]
        calls: dict[Future[Any], RewardFunctionSection] = {}
        try:
            for row in self.rows:
                calls[self._children.schedule(process.call, row.function, *texts, timeout_s=row.timeout_s)] = row
            failed = self._children.wait(calls, sum(row.timeout_s for row in self.rows) + GRACE_S)
            if failed is not None:
                raise _explained(calls[failed], len(completions), failed.exception())
        except BaseException:
            self.close()
            raise
        return {row.label: call.result() for call, row in calls.items()}

    def close(self) -> None:
        """Ends the processes. Does nothing the second time."""
        self._children.close()


def _explained(row: RewardFunctionSection, count: int, error: BaseException | None) -> BaseException:
    if isinstance(error, RewardFailed):
        return RewardFailed(*error.args)
    if isinstance(error, TimeoutError):
        return RewardFailed(
            f"{row.function} did not return within {row.timeout_s:g} s for {count} texts; a function has to return "
            "within its timeout_s"
        )
    return RewardFailed(f"{row.function} was rating {count} texts: {death(error)}")


def weighted(by_name: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """Returns the weighted sum of the rewards of each text. ``by_name``: the rewards of the texts by the name of the
    reward; there is a weight for each name."""
    columns = [[weights[name] * value for value in values] for name, values in by_name.items()]
    return [sum(row) for row in zip(*columns, strict=True)]
