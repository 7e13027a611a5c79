"""The objects of an environment, in processes of their own (`trainer.tasks.rewards.children`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from trainer.errors import InputError, RewardFailed
from trainer.tasks.environments import process
from trainer.tasks.environments.interface import Step
from trainer.tasks.rewards.children import GRACE_S, Children, death


class Environments:
    """An object of the environment ``spec`` for each text. ``processes``: among which the texts are divided;
    ``timeout_s``: for a call in a process; ``setting``: the key of the recipe in messages. The processes end with
    `close`, after a failure, and with this process."""

    def __init__(self, spec: str, processes: int, timeout_s: float, setting: str) -> None:
        """Raises InputError for an environment that cannot be loaded."""
        self._spec, self._count, self._timeout_s = spec, processes, timeout_s
        self._children = Children((spec,), setting, f"environment {spec}", pools=processes)
        try:
            lacking = self._children.schedule(process.check, spec).result()
        except BaseException as error:
            self.close()
            raise InputError(f"{setting} {spec!r} cannot be loaded: {death(error)}") from error
        if lacking:
            self.close()
            raise InputError(f"{setting} {spec!r} {lacking}; see trainer.tasks.environments.interface")

    def reset(self, texts: Sequence[tuple[str, str]]) -> None:
        """Makes an object for each text, from its prompt and reference; all earlier ones are freed. Raises
        RewardFailed."""
        self._call(process.reset, {n: (n, *text) for n, text in enumerate(texts)})

    def step(self, turns: Mapping[int, str]) -> dict[int, Step]:
        """Returns the answer to each turn, by the numbers of their texts. Raises RewardFailed."""
        answered = self._call(process.step, {n: (n, turn) for n, turn in turns.items()})
        return {n: step for share, steps in answered for n, step in zip(share, steps, strict=True)}

    def close(self) -> None:
        """Ends the processes. Does nothing the second time."""
        self._children.close()

    def _call(self, function: Callable[..., Any], arguments: Mapping[int, Any]) -> list[tuple[list[int], Any]]:
        """Calls the function in each process for its share, and returns the shares with the results."""
        shares = [[n for n in arguments if n % self._count == pool] for pool in range(self._count)]
        calls: dict[Future[Any], list[int]] = {}
        try:
            for pool, share in enumerate(shares):
                given = self._spec, [arguments[n] for n in share]
                calls[self._children.schedule(function, *given, timeout_s=self._timeout_s, pool=pool)] = share
            failed = self._children.wait(calls, self._timeout_s + GRACE_S)
            if failed is not None:
                raise self._explained(function.__name__, len(calls[failed]), failed.exception())
        except BaseException:
            self.close()
            raise
        return [(share, call.result()) for call, share in calls.items()]

    def _explained(self, method: str, count: int, error: BaseException | None) -> RewardFailed:
        if isinstance(error, RewardFailed):
            return RewardFailed(*error.args)
        if isinstance(error, TimeoutError):
            return RewardFailed(
                f"{self._spec}.{method} did not return within {self._timeout_s:g} s for {count} texts; raise "
                "environment_timeout_s or environment_processes, or end what takes so long"
            )
        return RewardFailed(f"{self._spec}.{method} was called for {count} texts: {death(error)}")
