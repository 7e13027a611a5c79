"""The engines that write texts with the policy's weights: the model itself, or servers next to it.

A task asks for the texts of a step, and gets a function that returns them. The model writes them at once; servers write
them while the task does something else.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol, TypeVar

import torch

from trainer.tasks.sampling import Completion, PolicySampler

T = TypeVar("T")
Texts = list[list[Completion]]
"""The completions of each micro-batch, prompt by prompt."""


class Asked(NamedTuple):
    """A prompt. ``keys``: one for each answer, from which its random numbers come."""

    tokens: Sequence[int]
    keys: Sequence[str]


Batches = Sequence[Sequence[Asked]]
"""The prompts of each micro-batch; the same number of micro-batches on every rank."""


class TextServers(Protocol):
    """Servers that write with the policy's adapter (`trainer.worker.rollout_servers`)."""

    def sync(self, version: int) -> str:
        """Collective: makes the weights after ``version`` steps known to all servers, unless they are. Returns the name
        under which the servers have them."""

    def write(self, adapter: str, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """Returns a completion for each prompt. Not a collective; may be called in any thread."""

    def close(self) -> None:
        """Ends servers that this rank has started."""


class Engine(Protocol):
    """``reproducible``: the same prompts, keys and weights give the same texts."""

    reproducible: bool

    def ask(
        self, module: torch.nn.Module, device: torch.device, batches: Batches, answers: int, version: int
    ) -> Callable[[], Texts]:
        """Collective: begins to write ``answers`` completions for each prompt. ``version``: the number of steps after
        which the weights are as they are now."""

    def close(self) -> None: ...


class ModelEngine:
    """The model in training."""

    reproducible = True

    def __init__(self, sampler: PolicySampler) -> None:
        self._sampler = sampler

    def ask(
        self, module: torch.nn.Module, device: torch.device, batches: Batches, answers: int, version: int
    ) -> Callable[[], Texts]:
        written = []
        for batch in batches:
            keys = [key for prompt in batch for key in prompt.keys]
            texts = self._sampler.write(module, [prompt.tokens for prompt in batch], keys, device, answers)
            for text in texts:
                text.version = version
            written.append(texts)
        return lambda: written

    def close(self) -> None:
        pass


class ServerEngine:
    """Servers, each of which has the base model and gets the adapter."""

    reproducible = False

    def __init__(self, servers: TextServers, sampler: PolicySampler) -> None:
        self._servers, self._sampler = servers, sampler

    def ask(
        self, module: torch.nn.Module, device: torch.device, batches: Batches, answers: int, version: int
    ) -> Callable[[], Texts]:
        adapter = self._servers.sync(version)
        asked = [(prompt.tokens, key) for batch in batches for prompt in batch for key in prompt.keys]
        self._sampler.check_room([tokens for tokens, _ in asked])
        prompts, seeds = [tokens for tokens, _ in asked], [seed_of(key) for _, key in asked]
        future = in_background(lambda: self._servers.write(adapter, prompts, seeds))

        def texts() -> Texts:
            written = future.result()
            for text in written:
                text.version, text.words = version, self._sampler.words(text.tokens)
            rest = iter(written)
            return [[next(rest) for prompt in batch for _ in prompt.keys] for batch in batches]

        return texts

    def close(self) -> None:
        self._servers.close()


def in_background(task: Callable[[], T]) -> Future[T]:
    """Runs the task in a thread that does not delay the end of the process, as those of an executor do: texts of a
    later step may be in work when a run ends."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="rollouts", daemon=True).start()
    return future


def seed_of(key: str) -> int:
    """Returns a seed of 31 bits."""
    return int.from_bytes(hashlib.sha256(f"rollout:{key}".encode()).digest()[:4], "big") >> 1
