"""Texts of several turns: the model writes, the environment answers, the model writes on.

The first turns are written like any texts. Then there are rounds: each rank gives the turns of its texts to the
environment, puts the answers behind them, and asks the engine for the next turns. The tokens of the answers
(`Rollout.given`) are read by the model and never learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from trainer.recipe.sections.rollouts.task import ENVIRONMENT
from trainer.tasks.environments.environments import Environments
from trainer.tasks.rollouts.dialogue import Dialogue
from trainer.tasks.rollouts.engine import Asked, Texts
from trainer.tasks.rollouts.ranks import Peers
from trainer.tasks.rollouts.rollout import Rollout
from trainer.tasks.sampling import Completion, PolicySampler

Ask = Callable[[Sequence[Sequence[Asked]]], Callable[[], Texts]]
"""Collective: lets the engine begin to write a text for each prompt (`trainer.tasks.rollouts.engine.Engine.ask`)."""


class TurnLimits(NamedTuple):
    """``turns``: the most turns of a text; ``longest``: the most tokens after its prompt."""

    turns: int
    longest: int


class TurnWriter:
    """``ranks``: those that write together."""

    def __init__(
        self,
        environments: Environments,
        dialogue: Dialogue,
        sampler: PolicySampler,
        limits: TurnLimits,
        ranks: Peers,
    ) -> None:
        self._environments, self._dialogue, self._sampler = environments, dialogue, sampler
        self._limits, self._ranks = limits, ranks

    def complete(
        self, batches: Sequence[Sequence[Rollout]], keys: Sequence[Sequence[str]], ask: Ask, where: str
    ) -> None:
        """Collective: continues texts after their first turn, and sets the environment's reward of each. ``keys``: of
        the texts of each micro-batch, from which those of further turns are made. Every rank takes part in as many
        rounds as the rank with the most turns. Raises on all ranks what fails on one; ``where``: for errors."""
        pairs = zip(itertools.chain(*batches), itertools.chain(*keys), strict=True)
        texts = [_Text(rollout, key) for rollout, key in pairs]
        self._ranks.together(lambda: self._begin([text.rollout for text in texts]), where)
        for turn in range(1, self._limits.turns + 1):
            last = turn == self._limits.turns
            self._ranks.together(partial(self._answer, texts, last=last), where)
            if not self._ranks.any(any(text.going for text in texts)):
                break
            going = {id(text.rollout): text for text in texts if text.going}
            chosen = [[going[id(rollout)] for rollout in some if id(rollout) in going] for some in batches]
            write = ask([[text.asked(turn) for text in some] for some in chosen])
            for some, written in zip(chosen, self._ranks.together(write, where), strict=True):
                for text, completion in zip(some, written, strict=True):
                    text.add(completion, self._sampler.tokenizer)

    def close(self) -> None:
        self._environments.close()

    def _begin(self, rollouts: Sequence[Rollout]) -> None:
        def words(ids: Sequence[int]) -> str:
            return str(self._sampler.tokenizer.decode(list(ids), skip_special_tokens=True))

        self._environments.reset([(words(r.prompt.tokens), words(r.prompt.answer)) for r in rollouts])

    def _answer(self, texts: Sequence[_Text], *, last: bool) -> None:
        """Lets the environment answer the last turn of each text that goes on. A text that ends keeps its tokens."""
        steps = self._environments.step({n: text.turn for n, text in enumerate(texts) if text.going})
        for n, step in steps.items():
            text, rollout = texts[n], texts[n].rollout
            rollout.rewards[ENVIRONMENT] += step.reward
            text.going = False
            if step.answer is None or not rollout.ended:
                continue
            turn = rollout.tokens[text.begin :]
            answer = self._dialogue.answer(step.answer, turn, ended=turn[-1] in self._sampler.ends)
            rollout.ended = text.going = not last and self._has_room(rollout, len(answer))
            if text.going:
                rollout.given.append((len(rollout.tokens), len(rollout.tokens) + len(answer)))
                rollout.tokens = [*rollout.tokens, *answer]

    def _has_room(self, rollout: Rollout, answer: int) -> bool:
        """Returns True if an answer of so many tokens and another turn of the model fit."""
        length, prompt = len(rollout.tokens) + answer + self._sampler.max_new_tokens, len(rollout.prompt.tokens)
        positions = self._sampler.positions
        return length <= self._limits.longest and (positions is None or prompt + length <= positions)


class _Text:
    """A text while it is written. ``turn``: the words of its last turn, which begins at token ``begin``. ``going``: the
    environment is to answer, or has answered."""

    def __init__(self, rollout: Rollout, key: str) -> None:
        self.rollout, self._key = rollout, key
        self.turn, self.begin, self.going = rollout.words, 0, True
        rollout.rewards = {ENVIRONMENT: 0.0}

    def asked(self, turn: int) -> Asked:
        """Returns the prompt for the turn with this number, from 0."""
        return Asked([*self.rollout.prompt.tokens, *self.rollout.tokens], [f"{self._key}:turn{turn}"])

    def add(self, completion: Completion, tokenizer: Any) -> None:
        rollout, self.turn, self.begin = self.rollout, completion.words, len(self.rollout.tokens)
        rollout.tokens = [*rollout.tokens, *completion.tokens]
        rollout.ended = completion.ended
        rollout.sampled = np.append(rollout.sampled, completion.logps)
        # All words up to what ended the last turn, which its own words leave out.
        whole, last = (
            str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (rollout.tokens, completion.tokens)
        )
        rollout.words = whole[: len(whole) - (len(last) - len(completion.words))]
