"""Generation of texts by the model in training: greedily, and on all ranks in step.

Every rank runs the same number of forward passes, which strategies that gather parameters in a forward need. A rank
that fails sends the error instead of its next token, so that all ranks end alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from trainer.errors import InputError
from trainer.model.kernels.attention import by_mask
from trainer.tasks.sampling import PolicySampler, stop_strings
from trainer.worker.build import Parts

T = TypeVar("T")
TOLD_CHARACTERS = 300


class Generation:
    """``on_token()`` is called for each token, the same number of times on every rank, so that a slow model is not
    taken for a hang. ``failure``: the error of the first rank that failed."""

    def __init__(self, parts: Parts, max_new_tokens: int, on_token: Callable[[], None]) -> None:
        self.parts, self.max_new_tokens, self._on_token = parts, max_new_tokens, on_token
        self.failure: str | None = None

    def attempt(self, generate: Callable[[], T]) -> T | None:
        """Collective: returns what ``generate`` returns; None if it has failed on a rank, with the `failure`."""
        made: T | None = None
        try:
            made = generate()
            self._exchange(None)
        except Exception as error:  # a model's own code may raise anything
            self._exchange(f"{type(error).__name__}: {error}"[:TOLD_CHARACTERS])
        return made if self.failure is None else None

    def _exchange(self, said: bool | str | None) -> bool:
        """Collective: returns True if a rank still generates and none has failed. A failed rank sends the error's
        text, which every rank keeps."""
        if self.failure is not None:  # the rank that failed sends nothing more
            return False
        told = self.parts.world.all_gather(said)
        self.failure = next((each for each in told if isinstance(each, str)), None)
        return self.failure is None and True in told

    def _agree(self, going: bool) -> bool:
        self._on_token()
        return self._exchange(going)

    def sampler(self, tokenizer: Any) -> PolicySampler:
        """Raises InputError if texts cannot be generated with a key-value cache, or would never end."""
        recipe, strategy = self.parts.recipe, self.parts.strategy
        if recipe.adapter.row.inserts_tokens:
            raise InputError(
                "texts are generated with a key-value cache, which "
                f"adapter.method {recipe.adapter.kind} may fill itself"
            )
        return PolicySampler(
            strategy.model,
            self.parts.task.head,
            tokenizer,
            max_new_tokens=self.max_new_tokens,
            temperature=0.0,
            top_p=1.0,
            stop=stop_strings(recipe, tokenizer),
            agree=self._agree,
        )

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Puts the model into its generating mode, and restores its previous mode and torch's random numbers."""
        strategy, device = self.parts.strategy, self.parts.world.device
        module = strategy.module
        compiles = self.parts.recipe.compute.compile
        eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
        was_training = module.training
        module.eval()
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                by_mask(strategy.model),
                eager,
                strategy.averaged(),
                strategy.autocast(),
            ):
                yield
        finally:
            strategy.reshard()
            module.train(was_training)
