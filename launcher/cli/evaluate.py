"""``muster evaluate``: the metrics of a run, an adapter or a model on a recipe's evaluation data."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import completion
from launcher.cli.options import FrameOption, ModelOption, Overrides, RunOption, TrustOption
from launcher.terminal.console import bar, hush_libraries, print_json, stderr
from trainer.errors import UsageError

if TYPE_CHECKING:
    from trainer.artifacts.locate import ArtifactRef
    from trainer.evaluate.scores import Line
    from trainer.recipe import Recipe


def evaluate(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="a recipe: YAML or JSON file; default: that of --run",
            autocompletion=completion.recipes,
        ),
    ] = None,
    overrides: Overrides = None,
    run: RunOption = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="URI", help="folder of an adapter, or of a fully fine-tuned model")
    ] = None,
    model: ModelOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="number of examples to use, from the first; default: all")
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="file for a JSON line per example; each is then measured alone")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of each generated answer; default: 32, and 512 for GSM8K")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="score generated answers to all prompts: exact_match | number | package.module:function | "
            "path.py:function",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval", metavar="TASK,...", help="tasks of lm-evaluation-harness, in place of data.eval; needs lm_eval"
        ),
    ] = None,
    lm_eval_tasks: Annotated[
        str | None,
        typer.Option("--lm-eval-tasks", metavar="FOLDER", help="folder with task files (YAML) of your own"),
    ] = None,
    frame: FrameOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Print metrics on evaluation data. A run, an adapter or a model is measured on data.eval of RECIPE; of a run, its
    own recipe is known. With --lm-eval, the tasks bring their data. The result is one JSON object."""
    from trainer.artifacts.locate import ArtifactRef

    address = ArtifactRef.of(run, [adapter] if adapter else None, model)
    if lm_eval is not None:
        _without({"--output": output, "--max-new-tokens": max_new_tokens, "--metric": metric}, "with --lm-eval")
        names = tuple(name.strip() for name in lm_eval.split(",") if name.strip())
        own = _recipe(recipe, overrides or [], run, evaluates=False) if recipe else None
        scores = _of_tasks(names, lm_eval_tasks, limit, frame, address, own, trust=trust_remote_code)
    else:
        _without({"--lm-eval-tasks": lm_eval_tasks, "--frame": frame}, "without --lm-eval")
        loaded = _recipe(recipe, overrides or [], run)
        scores = _of_recipe(loaded, address, limit, output, max_new_tokens, _metric(metric), trust=trust_remote_code)
    print_json(scores)


def _of_recipe(
    recipe: Recipe,
    address: ArtifactRef,
    limit: int | None,
    output: str | None,
    max_new_tokens: int | None,
    metric: str | None,
    *,
    trust: bool,
) -> dict[str, Any]:
    with _said() as say, _lines_into(output) as line, bar("answering") as answered:
        from trainer.evaluate import evaluate as scores_of

        return scores_of(
            recipe,
            address,
            limit=limit,
            line=line,
            metric=metric,
            max_new_tokens=max_new_tokens,
            say=say,
            answered=answered,
            trust=trust,
        )


def _of_tasks(
    names: tuple[str, ...],
    folder: str | None,
    limit: int | None,
    frame: str | None,
    address: ArtifactRef,
    recipe: Recipe | None,
    *,
    trust: bool,
) -> dict[str, Any]:
    with _said() as say:
        from trainer.evaluate import HarnessTasks, evaluate_tasks

        return evaluate_tasks(HarnessTasks(names, folder, limit, frame), address, recipe, say=say, trust=trust)


@contextmanager
def _said() -> Iterator[Callable[[str], None]]:
    """Yields what prints a phase. Libraries print too: stdout has the result alone."""
    from launcher.monitor.progress import Progress

    with redirect_stdout(sys.stderr):
        hush_libraries()
        yield Progress(stderr()).phase


def _without(options: Mapping[str, object], where: str) -> None:
    """Raises UsageError for the first of the options that was given."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} has no effect {where}; leave it out")


def _metric(text: str | None) -> str | None:
    from trainer.recipe.sections.generative_eval import metric_name

    try:
        return None if text is None else metric_name(text)
    except ValueError as error:
        raise UsageError(f"--metric {error}") from None


def _recipe(path: str | None, overrides: list[str], run: str | None, *, evaluates: bool = True) -> Recipe:
    """Reads the recipe, or the one that the run has frozen. Without a recipe, the first argument may be KEY=VALUE.
    ``evaluates``: the recipe of a run must have evaluation data."""
    from trainer.progress.ending import evaluate_command
    from trainer.recipe import load
    from trainer.run.frozen import changed_recipe
    from trainer.storage import open_storage

    if path is not None and not ("=" in path and run is not None and not Path(path).exists()):
        return load(path, overrides)
    if run is None:
        raise UsageError("name the RECIPE whose evaluation data are used; only a --run has its own")
    found = changed_recipe(open_storage(run), [path, *overrides] if path else overrides)
    if evaluates and not found.data.evaluates:
        raise UsageError(f"the recipe of {run} has no evaluation data; name some: {evaluate_command(found, run)}")
    return found


@contextmanager
def _lines_into(output: str | None) -> Iterator[Line | None]:
    if output is None:
        yield None
        return
    try:
        file = open(output, "w", encoding="utf-8")  # noqa: SIM115 - closed below, and what is raised inside is not this
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}") from error

    def line(example: Mapping[str, Any]) -> None:
        file.write(json.dumps(example, ensure_ascii=False) + "\n")

    with file:
        yield line
