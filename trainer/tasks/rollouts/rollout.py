"""Rollouts of a step: the texts of all ranks with their rewards, and the micro-batches that are made of them.

Legend: R tokens of a text that the model wrote, B rows and L tokens of a micro-batch, T tokens of its texts.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trainer.tasks.sampling import SamplingPrompt

Row = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
EMPTY_LENGTH = 8
NOTHING: Row = np.zeros(0)


@dataclass
class Rollout:
    """A text written for a prompt. ``place``: the number of the prompt in the step, and that of the answer. ``tokens``:
    all that follow the prompt. ``given``: where those begin and end that an environment gave (`turns`); the model wrote
    all others. ``ended``: False for a text that was cut off. ``sampled`` [R]: log-probabilities by the engine that
    wrote it, if that is not the model itself. ``version``: the number of steps after which the weights were taken that
    wrote it. ``logps`` and ``reference`` [R]: log-probabilities under the policy as it is before the step's updates,
    and under the reference; ``values`` [R]: of a critic before each token. ``rewards``: by their source; ``reward``:
    their weighted sum; ``score``: the reward without the penalties."""

    place: tuple[int, int]
    prompt: SamplingPrompt
    tokens: list[int]
    ended: bool
    words: str
    version: int = 0
    sampled: Row = field(default_factory=lambda: NOTHING)
    logps: Row = field(default_factory=lambda: NOTHING)
    reference: Row = field(default_factory=lambda: NOTHING)
    values: Row = field(default_factory=lambda: NOTHING)
    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    score: float = 0.0
    given: list[tuple[int, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """The number of tokens that the model wrote."""
        return len(self.tokens) - sum(end - start for start, end in self.given)

    @property
    def kl(self) -> float:
        """Estimate of the divergence from the reference over the text, in nats."""
        return float((self.logps - self.reference).sum())


@dataclass
class PromptCompletionBatch:
    """Prompts, each followed by its text, in the layout of `trainer.data.Batch`: pads are at the end, at position 0.
    ``targets`` marks the tokens that the model wrote, T in total. A micro-batch of weight zero has no target."""

    index: int
    input_ids: Ints
    position_ids: Ints
    targets: npt.NDArray[np.bool_]
    sample_ids: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]], index: int, sample_ids: Sequence[str]
    ) -> PromptCompletionBatch:
        width = max((len(prompt) + len(text) for prompt, text in rows), default=EMPTY_LENGTH)
        shape = (max(1, len(rows)), width)
        made = cls(index, np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_))
        made.sample_ids = list(sample_ids)
        for row, (prompt, text) in enumerate(rows):
            end = len(prompt) + len(text)
            made.input_ids[row, :end] = [*prompt, *text]
            made.position_ids[row, :end] = np.arange(end)
            made.targets[row, len(prompt) : end] = True
        return made

    @classmethod
    def of_rollouts(cls, rollouts: Sequence[Rollout], index: int) -> PromptCompletionBatch:
        rows = [(r.prompt.tokens, r.tokens) for r in rollouts]
        made = cls.of(rows, index, [r.prompt.sample_id for r in rollouts])
        for row, rollout in enumerate(rollouts):
            for start, end in rollout.given:
                before = len(rollout.prompt.tokens)
                made.targets[row, before + start : before + end] = False
        return made


@dataclass
class RolloutMicroBatch:
    """A micro-batch of an update: texts, and what a task's loss needs of each of their T tokens (its subclass)."""

    texts: PromptCompletionBatch

    @property
    def index(self) -> int:
        return self.texts.index

    @property
    def sample_ids(self) -> list[str]:
        return self.texts.sample_ids


class Experience(ABC):
    """All rollouts of a step, in the order of the data, with what a task makes of them."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.rollouts = sorted(rollouts, key=lambda r: r.place)

    def metrics(self) -> dict[str, float]:
        scores = np.array([r.score for r in self.rollouts])
        lengths = np.array([r.length for r in self.rollouts])
        by_source = {f"reward_{name}": [r.rewards[name] for r in self.rollouts] for name in self.rollouts[0].rewards}
        return {
            "reward": float(scores.mean()),
            "reward_std": float(scores.std()),
            **{name: float(np.mean(values)) for name, values in by_source.items() if len(by_source) > 1},
            "response_length": float(lengths.mean()),
            "response_length_max": float(lengths.max()),
            "response_tokens": float(lengths.sum()),
            "ended": float(np.mean([r.ended for r in self.rollouts])),
        }

    def parts(self, minibatches: int, key: str) -> Iterator[Ints]:
        """Yields the indices of the rollouts of each minibatch of an epoch: random parts of equal size; one without any
        if there is nothing to learn from."""
        digest = hashlib.sha256(f"minibatches:{key}".encode()).digest()
        order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).permutation(self.learned())
        parts = np.array_split(order, minibatches)
        yield from [part for part in parts if len(part)] or parts[:1]

    def learned(self) -> Ints:
        """Returns the indices of the rollouts that take part in the loss."""
        return np.arange(len(self.rollouts))

    def moving(self, part: Ints) -> Ints:
        """Returns those of ``part`` whose loss can have a gradient, the longest last."""
        return part[np.argsort([len(self.rollouts[n].tokens) for n in part], kind="stable")]

    @abstractmethod
    def units(self, part: Ints) -> int:
        """Returns the number that the loss of an update is divided by."""

    @abstractmethod
    def micro_batch(self, part: Ints, index: int) -> RolloutMicroBatch:
        """Returns the micro-batch of the rollouts with the indices ``part``, which may be empty."""


def flat(rows: Sequence[Row]) -> Floats:
    """Joins values of the texts' tokens, text by text: float32 [T]."""
    return np.concatenate([NOTHING, *rows]).astype(np.float32)
