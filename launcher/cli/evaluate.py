"""``muster evaluate``: the metrics of a run, an adapter or a model on a recipe's evaluation data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli.options import ModelOption, Overrides, RecipeFile, RunOption, TrustOption
from launcher.terminal.console import bar, hush_libraries, print_json, stderr
from trainer.errors import UsageError

if TYPE_CHECKING:
    from trainer.evaluate.scores import Line


def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    run: RunOption = None,
    adapter: Annotated[str | None, typer.Option(help="folder of an adapter, or of a fully fine-tuned model")] = None,
    model: ModelOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="number of examples to use, from the first; default: all")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="file for a JSON line per example; each is then measured alone")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of each generated answer; default: 32, and 512 for GSM8K")
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Print the metrics of a run, an adapter or a model on RECIPE's data.eval, as one JSON object."""
    from trainer.artifacts.locate import ArtifactRef
    from trainer.recipe import load

    address = ArtifactRef.of(run, [adapter] if adapter else None, model)
    loaded = load(recipe, overrides or [])
    with redirect_stdout(sys.stderr), _lines_into(output) as line:  # libraries print; stdout has the result alone
        from launcher.monitor.progress import Progress
        from trainer.evaluate import evaluate as scores_of

        hush_libraries()
        say = Progress(stderr()).phase
        with bar("answering") as answered:
            scores = scores_of(
                loaded,
                address,
                limit=limit,
                line=line,
                max_new_tokens=max_new_tokens,
                say=say,
                answered=answered,
                trust=trust_remote_code,
            )
    print_json(scores)


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
