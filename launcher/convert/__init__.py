"""``muster convert``: turns another trainer's settings into a recipe and names each key that has no counterpart.

A source is a module with ``convert(settings, file, workers) -> Draft`` and a line in SOURCES. The recipe's own model
validates the result before it is printed. If it is not valid, nothing is printed and the obstacles are reported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from launcher.convert.draft import Draft
from launcher.convert.writing import written
from launcher.terminal.console import stderr
from trainer.errors import RecipeError, UsageError
from trainer.parsing import Malformed, parse_yaml
from trainer.registry import Registry

SOURCES = Registry(
    "source of recipes",
    {
        "axolotl": "launcher.convert.axolotl:convert",
        "llamafactory": "launcher.convert.llamafactory:convert",
    },
)


def convert(
    source: Annotated[str, typer.Argument(metavar="axolotl|llamafactory", help="whose settings FILE holds")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the YAML file")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the recipe here instead of on stdout")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="number of GPUs that it ran on; multiplies its batch")
    ] = None,
) -> None:
    """Turn the settings of axolotl or LLaMA-Factory into a recipe, and report what could not be carried over."""
    draft = SOURCES.load(source)(read(file), file, workers)
    text, hindrances = checked(draft, source, file)
    console = stderr()
    for line in draft.report():
        console.print(Text(line), soft_wrap=True)
    if hindrances:
        raise UsageError("\n".join([f"{file} gives no recipe:", *(f"  {line}" for line in hindrances)]))
    if out is None:
        print(text, end="")
    else:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{out} cannot be written: {error.strerror or error}") from None
        console.print(Text(f"wrote {out}"), soft_wrap=True)


def checked(draft: Draft, source: str, file: Path) -> tuple[str, list[str]]:
    """Returns the recipe's text and its obstacles: those that the source found, else the mistakes of the validation."""
    from trainer.recipe import loads

    hindrances = [f"{key}: {reason}" for key, reason in draft.hindrances.items()]
    text = written(draft, source, file)
    if not hindrances:
        try:
            loads(text)
        except RecipeError as error:
            hindrances = [f"{mistake.path}: {mistake.message}" for mistake in error.mistakes]
    return text, hindrances


def read(file: Path) -> dict[str, Any]:
    """Reads the settings by the rules of YAML 1.1, as both programs do; raises UsageError."""
    from trainer.recipe.loading import LARGEST_RECIPE

    try:
        with file.open("rb") as opened:
            body = opened.read(LARGEST_RECIPE + 1)
        if len(body) > LARGEST_RECIPE:
            raise UsageError(f"{file} has more than {LARGEST_RECIPE:,} bytes; settings have a few thousand")
        settings = parse_yaml(body.decode())
    except FileNotFoundError:
        raise UsageError(f"{file}: there is no such file") from None
    except Malformed as error:
        line = f", line {error.line}" if error.line else ""
        raise UsageError(f"{file}{line} is not YAML that can be used: {error}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{file} holds no mapping of settings")
    return {str(key): value for key, value in settings.items()}
