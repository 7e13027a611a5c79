"""Evaluation by generated answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.recipe.base import Conflict, Section
from trainer.recipe.generative_metrics import GENERATIVE_METRICS, scores_of
from trainer.recipe.sections.rollouts.reward import function_name
from trainer.registry import choose_hint


def metric_name(text: str) -> str:
    """Returns the name of a metric, or of a function; raises ValueError for anything else."""
    if text in GENERATIVE_METRICS:
        return text
    if ":" in text:
        return function_name(text)
    names = GENERATIVE_METRICS.names()
    raise ValueError(
        f"{text!r} is not one of: {', '.join(names)}{choose_hint(text, names)}, and no function; write a name, or "
        "package.module:function, or path.py:function"
    )


class GenerativeEvalSection(Section):
    """Evaluation by generated answers: in evaluations, the model answers questions of `data.eval` by greedy decoding,
    and a metric scores the answers. Language models only; no effect on the result of training. See
    [tasks.md](tasks.md#scores-of-generated-answers-while-training)."""

    count: int | None = Field(default=None, ge=0, examples=[64])
    """Number of questions, over all ranks, from the first samples of `data.eval` that have a prompt and an answer; null
    and 0 generate no answers."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations with answers, a multiple of `training.eval_every`; null answers in each
    evaluation. The evaluation after the last step always has answers."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum tokens of an answer; each token is a forward pass on every rank."""

    metric: Annotated[str, AfterValidator(metric_name)] = Field(default="auto", examples=["number"])
    """`exact_match`: SQuAD's exact match and F1 (`eval_exact_match`, `eval_f1`); `number`: the share of texts whose
    last number is that of the answer (`eval_accuracy`); `auto`: `number` for answers that end with `#### 42`, else
    `exact_match`. Or a function of your own, `package.module:function` or `path.py:function`, relative to the working
    folder: it is called with the lists of texts `prompts`, `completions` and `references`, and returns a list of finite
    numbers, one per completion (`eval_score` is their mean). It is the recipe's own code: nothing is loaded from a
    storage."""

    @property
    def metrics(self) -> dict[str, Literal["max"]]:
        """The names of the metrics in an evaluation, with the direction that is better: ``max`` for all of them; empty
        without answers. Under `auto`, the data decide which of them there are."""
        names = scores_of(self.metric) if self.count else ()
        return {f"eval_{name}": "max" for name in names}

    @property
    def function(self) -> str | None:
        """The function of the recipe that scores the answers, if it names one."""
        return None if self.metric in GENERATIVE_METRICS else self.metric

    def conflicts(self) -> Iterator[Conflict]:
        if self.count is None:
            for name in self.given():
                message = "has no effect without generative_eval.count; set it, or leave this out"
                yield Conflict(((name,), ("count",)), message)
