"""The last lines of a finished run: what it has learned and what that took, and commands for its result."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress

from trainer.checkpoint.protocol import list_commits
from trainer.errors import MusterError
from trainer.progress import vllm_command
from trainer.progress.program import program
from trainer.progress.texts import duration
from trainer.recipe import Recipe
from trainer.recipe.tasks import TASKS
from trainer.run.best import read_best
from trainer.run.jsonl import metrics_backwards
from trainer.run.metrics import EvalMetrics, Metrics, StepMetrics
from trainer.storage import Storage


def last_lines(recipe: Recipe, run: Storage, adapter: str) -> Iterator[str]:
    """Yields a summary, then one command per line, to be printed without wrapping. ``adapter``: the URI of the final
    adapter. A storage that does not answer any more costs the summary only: the run has succeeded."""
    with suppress(MusterError, OSError):
        if summary := summarised(metrics_backwards(run)):
            yield summary
        newest = next(iter(list_commits(run, newest=1)), None) if recipe.checkpoint.keep_best else None
        if newest is not None and (best := read_best(newest.state)) is not None:
            yield f"the adapter is that of step {best.step}, the best evaluation: {best.metric} {best.value:.4g}"
    writes_texts = not TASKS[recipe.task].has_head
    yield shlex.join([program(), "chat", "--run", run.url]) if writes_texts else evaluate_command(recipe, run.url)
    yield shlex.join([program(), "report", run.url])
    yield from vllm_command.of_recipe(recipe, adapter)


def evaluate_command(recipe: Recipe, run: str) -> str:
    """Returns the command that measures a run; without evaluation data in its recipe, with a FILE to be filled in."""
    words = [program(), "evaluate", "--run", run]
    if not recipe.data.evaluates:
        words.append(f"data.eval=[{{path: FILE, format: {recipe.data.train[0].format}}}]")
    return shlex.join(words)


def summarised(newest_first: Iterable[Metrics]) -> str:
    """Returns the first and the last loss, the steps, the time of all steps and evaluations, and the tokens; empty
    without a step. Of a step that was trained again after a failure, only the newest row counts."""
    seconds, tokens = 0.0, 0
    losses: dict[int, float | None] = {}
    evaluated: dict[int, float | None] = {}
    for row in newest_first:
        seconds += row.seconds
        if isinstance(row, StepMetrics) and row.step not in losses:
            losses[row.step] = row.loss
            tokens += row.tokens or 0
        elif isinstance(row, EvalMetrics):
            evaluated.setdefault(row.step, row.eval_loss)
    if not losses:
        return ""
    parts = [_first_and_last("loss", losses), _first_and_last("eval", evaluated)]
    steps = f"{len(losses):,} step{'' if len(losses) == 1 else 's'}"
    return ", ".join([*filter(None, parts), steps, duration(seconds), f"{tokens:,} tokens"])


def _first_and_last(name: str, losses: dict[int, float | None]) -> str:
    found = [loss for _, loss in sorted(losses.items()) if loss is not None]
    if not found:
        return ""
    return f"{name} {found[0]:.4g}" + (f" → {found[-1]:.4g}" if len(found) > 1 else "")
