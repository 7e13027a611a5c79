"""Stored rollouts: what an engine wrote that would not write the same again.

The rollouts of a step are stored before anything is learned from them, so that an attempt that resumes before that step
learns from the same texts.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from trainer.errors import CorruptObject
from trainer.parsing import Malformed
from trainer.records import read_record
from trainer.run import layout
from trainer.storage import Storage
from trainer.tasks.rollouts.ranks import Peers
from trainer.tasks.rollouts.rollout import Rollout
from trainer.tasks.rollouts.writer import Prompts, by_prompt
from trainer.tasks.sampling import SamplingPrompt

log = logging.getLogger(__name__)


class GivenTokens(NamedTuple):
    """A range of the tokens of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class StoredRollout:
    """A line of the file; see `Rollout`."""

    place: tuple[int, int]
    sample: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    tokens: tuple[int, ...]
    ended: bool
    words: str
    version: int
    sampled: tuple[float, ...]
    rewards: dict[str, float]
    reward: float
    score: float
    given: tuple[GivenTokens, ...] = ()

    @classmethod
    def of(cls, rollout: Rollout) -> StoredRollout:
        prompt = rollout.prompt
        tokens = tuple(prompt.tokens), tuple(prompt.answer), tuple(rollout.tokens)
        sampled = tuple(float(value) for value in rollout.sampled)
        outcome = dict(rollout.rewards), float(rollout.reward), float(rollout.score)
        text = rollout.ended, rollout.words, rollout.version
        given = tuple(GivenTokens(*span) for span in rollout.given)
        return cls(rollout.place, prompt.sample_id, *tokens, *text, sampled, *outcome, given)

    def rollout(self) -> Rollout:
        prompt = SamplingPrompt(self.sample, list(self.prompt), list(self.answer))
        text = list(self.tokens), self.ended, self.words, self.version, np.array(self.sampled, np.float64)
        made = Rollout(self.place, prompt, *text, rewards=self.rewards, reward=self.reward, score=self.score)
        made.given = [(span.start, span.end) for span in self.given]
        return made


class RolloutStore:
    """The rollouts of a run, one object for each step. ``keep``: steps that stay; older ones are deleted."""

    def __init__(self, run: Storage, keep: int) -> None:
        self._run, self._keep = run, keep
        self._before: frozenset[int] | None = None

    def steps_before(self, ranks: Peers) -> frozenset[int]:
        """Collective: returns the steps whose rollouts were stored before this attempt's first call."""
        if self._before is None:
            self._before = ranks.decide(self._steps)
        return self._before

    def load(self, step: int, ranks: Peers, prompts: Prompts, answers: int) -> list[list[Rollout]] | None:
        """Collective: returns the rollouts for this rank's prompts, which an attempt before has stored; None if there
        are none, or none for these prompts."""
        if step not in self.steps_before(ranks):
            return None
        try:
            groups = by_prompt(ranks.decide(lambda: self._read(step)))
        except CorruptObject as error:
            log.warning("step %d: its texts are written again: %s", step, error)
            return None
        found = [[(prompt, groups.get(prompt.number, [])) for prompt in batch] for batch in prompts]
        other = any(
            len(group) != answers or {r.prompt.sample_id for r in group} != {prompt.sample.sample_id}
            for batch in found
            for prompt, group in batch
        )
        if ranks.any(other):
            log.warning("step %d: its texts are written again: the stored ones are for other prompts", step)
            return None
        return [[rollout for _, group in batch for rollout in group] for batch in found]

    def save(self, step: int, ranks: Peers, mine: Sequence[Rollout]) -> None:
        """Collective: stores the rollouts of all ranks."""
        rollouts = sorted(ranks.joined(mine), key=lambda r: r.place)

        def write() -> None:
            lines = [json.dumps(asdict(StoredRollout.of(rollout))) for rollout in rollouts]
            self._run.write(layout.rollouts(step), gzip.compress("\n".join(lines).encode(), compresslevel=3, mtime=0))
            if step > self._keep:
                self._run.delete([layout.rollouts(step - self._keep)])

        ranks.decide(write)

    def _steps(self) -> frozenset[int]:
        keys = (info.key for info in self._run.list(layout.ROLLOUTS))
        return frozenset(step for key in keys if (step := layout.parse_rollouts(key)) is not None)

    def _read(self, step: int) -> list[Rollout]:
        key = layout.rollouts(step)
        try:
            lines: list[Any] = [json.loads(line) for line in gzip.decompress(self._run.read(key)).splitlines()]
            return [read_record(StoredRollout, line).rollout() for line in lines]
        except (OSError, EOFError, ValueError, Malformed) as error:
            raise CorruptObject(f"{self._run.uri(key)} is not the rollouts of a step: {error}") from error
