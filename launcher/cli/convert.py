"""``muster convert``: print the settings of another trainer as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from launcher.convert import SOURCES, checked, read
from launcher.terminal.console import stderr
from trainer.errors import UsageError


def convert(
    source: Annotated[str, typer.Argument(metavar="axolotl|llamafactory", help="the trainer that FILE is for")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the YAML file")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="write the recipe here instead of on stdout")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="number of GPUs that it ran on; multiplies its batch size")
    ] = None,
) -> None:
    """Turn the settings of axolotl or LLaMA-Factory into a recipe. What could not be carried over is reported."""
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
