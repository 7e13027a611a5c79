"""Writes the rollouts of a step: prompts to an engine, texts to the rewards, results to the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.tasks.rollouts.engine import Asked, Engine, Texts
from trainer.tasks.rollouts.policy import PolicyHead
from trainer.tasks.rollouts.ranks import Peers
from trainer.tasks.rollouts.rollout import Rollout
from trainer.tasks.rollouts.scoring import Scoring
from trainer.tasks.rollouts.turns import TurnWriter
from trainer.tasks.sampling import SamplingPrompt


class Prompt(NamedTuple):
    """``number``: of the prompt in its step."""

    number: int
    sample: SamplingPrompt


Prompts = Sequence[Sequence[Prompt]]
"""The prompts of each micro-batch of this rank."""


@dataclass(frozen=True)
class Request:
    """The texts to write. ``answers``: for each prompt. ``key``: of a text's random numbers, from the number of the
    prompt, that of the answer, and the sample's id. ``version``: the number of steps after which the weights are as
    they are now. ``where``: for errors. ``rewrites``: how often the answers to a prompt are written again while all of
    them have the same reward."""

    prompts: Prompts
    answers: int
    key: Callable[[int, int, str], str]
    version: int
    where: str
    rewrites: int = 0

    def of_round(self, number: int, prompts: Prompts) -> Request:
        """Returns the request for other texts, with other random numbers."""
        key = lambda prompt, answer, sample: f"{self.key(prompt, answer, sample)}:{number}"  # noqa: E731
        return replace(self, prompts=prompts, key=key)

    def asked(self) -> list[list[Asked]]:
        return [
            [Asked(p.tokens, [self.key(number, n, p.sample_id) for n in range(self.answers)]) for number, p in batch]
            for batch in self.prompts
        ]

    def rollouts(self, texts: Texts) -> list[list[Rollout]]:
        made = []
        for batch, written in zip(self.prompts, texts, strict=True):
            places = [(number, n, sample) for number, sample in batch for n in range(self.answers)]
            made.append(
                [
                    Rollout((number, n), sample, t.tokens, t.ended, t.words, t.version, np.array(t.logps, np.float64))
                    for (number, n, sample), t in zip(places, written, strict=True)
                ]
            )
        return made


class RolloutWriter:
    """``penalty``: what is subtracted from the reward of a text. ``turns``: for texts of several turns."""

    def __init__(
        self,
        engine: Engine,
        scoring: Scoring,
        ranks: Peers,
        model: Any,
        head: PolicyHead,
        penalty: Callable[[Rollout], float],
        turns: TurnWriter | None = None,
    ) -> None:
        self._turns = turns
        self.engine, self.scoring, self._ranks = engine, scoring, ranks
        self._model, self._head, self._penalty = model, head, penalty

    def begin(self, module: torch.nn.Module, device: torch.device, request: Request) -> Callable[[], Texts]:
        """Collective: lets the engine begin; the result returns the texts."""
        return self.engine.ask(module, device, request.asked(), request.answers, request.version)

    def finish(
        self, module: torch.nn.Module, device: torch.device, request: Request, write: Callable[[], Texts]
    ) -> list[list[Rollout]]:
        """Collective: returns the rollouts of this rank's micro-batches with their rewards, in the order of the
        prompts. An error of one rank is raised on all of them."""
        found: list[dict[int, list[Rollout]]] = [{} for _ in request.prompts]
        for number in range(request.rewrites + 1):
            for groups, rollouts in zip(found, self._rewarded(module, device, request, write), strict=True):
                groups.update(by_prompt(rollouts))
            if number == request.rewrites:
                break
            alike = [
                [prompt for prompt in batch if is_alike(groups[prompt.number])]
                for groups, batch in zip(found, request.prompts, strict=True)
            ]
            if not self._ranks.any(any(alike)):
                break
            request = request.of_round(number + 1, alike)
            write = self.begin(module, device, request)
        return [[rollout for number in sorted(groups) for rollout in groups[number]] for groups in found]

    def _rewarded(
        self, module: torch.nn.Module, device: torch.device, request: Request, write: Callable[[], Texts]
    ) -> list[list[Rollout]]:
        made = self._ranks.together(lambda: request.rollouts(write()), request.where)
        if self._turns is not None:
            keys = [[key for prompt in batch for key in prompt.keys] for batch in request.asked()]
            ask = lambda batches: self.engine.ask(module, device, batches, 1, request.version)  # noqa: E731
            self._turns.complete(made, keys, ask, request.where)
        self._ranks.together(lambda: self._score(made, module, device), request.where)
        return made

    def _score(self, made: Sequence[Sequence[Rollout]], module: torch.nn.Module, device: torch.device) -> None:
        self.scoring.score(made, self._model, self._head, module, device)
        for rollout in (rollout for some in made for rollout in some):
            rollout.score = rollout.reward - self._penalty(rollout)

    def close(self) -> None:
        self.engine.close()
        self.scoring.close()
        if self._turns is not None:
            self._turns.close()


def by_prompt(rollouts: Sequence[Rollout]) -> dict[int, list[Rollout]]:
    """Returns the answers to each prompt, by its number."""
    found: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.place[0], []).append(rollout)
    return found


def is_alike(group: Sequence[Rollout]) -> bool:
    """Returns True if all answers to a prompt have the same score, so that none is better than another."""
    return max(r.score for r in group) == min(r.score for r in group)
