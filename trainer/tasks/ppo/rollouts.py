"""Rollouts of an iteration: the texts of all ranks with their scores and values, cut into minibatches.

Legend: R tokens of a text, B rows and L tokens of a micro-batch, T tokens of its texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trainer.recipe.sections.ppo import PPOSection
from trainer.tasks.ppo.advantages import Row, divergence, explained_variance, gae, token_rewards, whitened
from trainer.tasks.sampling import SamplingPrompt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
EMPTY_LENGTH = 8


@dataclass
class Rollout:
    """A text generated for a prompt. ``place``: micro-batch and row in the step. ``logps`` and ``reference`` [R]:
    log-probabilities under the policy that generated it and under the reference. ``values`` [R]: of the value head
    before each token. ``score``: from the reward, minus the penalty for a text that did not end."""

    place: tuple[int, int]
    prompt: SamplingPrompt
    tokens: list[int]
    ended: bool
    words: str
    logps: Row = field(default_factory=lambda: np.zeros(0))
    reference: Row = field(default_factory=lambda: np.zeros(0))
    values: Row = field(default_factory=lambda: np.zeros(0))
    score: float = 0.0

    @property
    def kl(self) -> float:
        """Estimate of the divergence from the reference over the text, in nats."""
        return float((self.logps - self.reference).sum())


@dataclass
class PromptCompletionBatch:
    """Prompts, each followed by its text, in the layout of `trainer.data.Batch`: pads are at the end, at position 0.
    ``targets`` marks the tokens of the texts, T in total. A micro-batch of weight zero has no target."""

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


@dataclass
class PPOMicroBatch:
    """A micro-batch of an update: the inputs of the losses, each float32 [T], row by row along ``texts.targets``."""

    texts: PromptCompletionBatch
    logps: Floats
    values: Floats
    advantages: Floats
    returns: Floats

    @property
    def index(self) -> int:
        return self.texts.index

    @property
    def sample_ids(self) -> list[str]:
        return self.texts.sample_ids

    @classmethod
    def empty(cls) -> PPOMicroBatch:
        nothing = np.zeros(0, np.float32)
        return cls(PromptCompletionBatch.of([], -1, []), nothing, nothing, nothing, nothing)


class Experience:
    """All rollouts of an iteration, in the order of the plan, with their advantages and returns."""

    def __init__(self, rollouts: Sequence[Rollout], section: PPOSection, kl_coef: float) -> None:
        self.rollouts = sorted(rollouts, key=lambda r: r.place)
        self._divergences = [divergence(r.logps, r.reference, section.kl_estimator) for r in self.rollouts]
        rewards = [token_rewards(r.score, kl, kl_coef) for r, kl in zip(self.rollouts, self._divergences, strict=True)]
        if section.whiten_rewards:
            rewards = whitened(rewards, centred=False)
        advantages = [
            gae(reward, r.values, section.gamma, section.lam) for reward, r in zip(rewards, self.rollouts, strict=True)
        ]
        self.returns = [a + r.values for a, r in zip(advantages, self.rollouts, strict=True)]
        self.advantages = whitened(advantages, centred=True) if section.whiten_advantages else advantages

    @property
    def kl(self) -> float:
        """Nats per text, by the recipe's estimator."""
        return float(np.mean([kl.sum() for kl in self._divergences]))

    def metrics(self) -> dict[str, float]:
        scores = np.array([r.score for r in self.rollouts])
        lengths = np.array([len(r.tokens) for r in self.rollouts])
        return {
            "reward": float(scores.mean()),
            "reward_std": float(scores.std()),
            "kl": self.kl,
            "value_explained_variance": explained_variance(
                np.concatenate([r.values for r in self.rollouts]), np.concatenate(self.returns)
            ),
            "response_length": float(lengths.mean()),
            "response_length_max": float(lengths.max()),
            "response_tokens": float(lengths.sum()),
            "ended": float(np.mean([r.ended for r in self.rollouts])),
        }

    def parts(self, minibatches: int, key: str) -> Iterator[Ints]:
        """Yields the indices of the rollouts of each minibatch of an epoch: random parts of equal size."""
        digest = hashlib.sha256(f"minibatches:{key}".encode()).digest()
        order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).permutation(len(self.rollouts))
        yield from (part for part in np.array_split(order, minibatches) if len(part))

    def tokens(self, part: Ints) -> int:
        return sum(len(self.rollouts[n].tokens) for n in part)

    def learnt(self, part: Ints, index: int) -> PPOMicroBatch:
        """Returns the micro-batch of the rollouts with the indices ``part``."""
        some = [self.rollouts[n] for n in part]
        rows = [(r.prompt.tokens, r.tokens) for r in some]

        def flat(values: Sequence[Row]) -> Floats:
            return np.concatenate(values).astype(np.float32)

        return PPOMicroBatch(
            PromptCompletionBatch.of(rows, index, [r.prompt.sample_id for r in some]),
            flat([r.logps for r in some]),
            flat([r.values for r in some]),
            flat([self.advantages[n] for n in part]),
            flat([self.returns[n] for n in part]),
        )
