"""The command line: ``muster …`` and ``python -m launcher …`` are this program.

Results go to stdout, everything else to stderr. Nothing heavy is imported before a command needs it: the modules here
have the options, and each command imports what it calls.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from launcher.cli import (
    convert,
    doctor,
    evaluate,
    export,
    generate,
    init,
    matrix,
    plan,
    prepare,
    preview,
    remove,
    run,
    status,
    submit,
    sweep,
)
from launcher.cli import validate as validation
from launcher.cli.help import Command, Group
from launcher.terminal.exit_codes import carried_out, print_error
from trainer.errors import MusterError
from trainer.fast_imports import mute_libraries
from trainer.terminal import LOG_FORMAT, shown

COMMANDS: dict[str, tuple[tuple[str, Callable[..., None], str], ...]] = {
    "Write and check a recipe": (
        ("init", init.init, "muster init qwen3-0.6b-chat > my.yaml"),
        ("validate", validation.validate, "muster validate my.yaml --inputs"),
        ("preview", preview.preview, "muster preview my.yaml --rows 5"),
        ("convert", convert.convert, "muster convert axolotl their.yaml --out my.yaml"),
        ("matrix", matrix.matrix, "muster matrix --task dpo"),
        ("schema", validation.schema, "muster schema > recipe.schema.json"),
    ),
    "Plan and train": (
        ("plan", plan.plan, "muster plan my.yaml --gpu-memory 24GiB"),
        ("prepare", prepare.prepare, "muster prepare my.yaml"),
        ("doctor", doctor.doctor, "muster doctor my.yaml"),
        ("run", run.run, "muster run my.yaml optimizer.lr=1e-4 training.epochs=2"),
        ("sweep", sweep.sweep, "muster sweep my.yaml optimizer.lr=1e-4,3e-4 adapter.rank=8,16 --stop asha"),
        ("render", submit.render, "muster render my.yaml --on slurm"),
        ("cancel", submit.cancel, "muster cancel runs/my"),
    ),
    "Watch runs": (
        ("ls", status.list_, "muster ls runs"),
        ("status", status.status, "muster status runs/my --watch"),
        ("logs", status.logs, "muster logs runs/my --follow"),
        ("report", status.report, "muster report runs/my runs/other -o compared.html"),
        ("track", status.track, "muster track runs/my tracking=[wandb]"),
    ),
    "Use what was trained": (
        ("chat", generate.chat, "muster chat --run runs/my"),
        ("generate", generate.generate, "muster generate --run runs/my --prompt 'Who are you?'"),
        ("evaluate", evaluate.evaluate, "muster evaluate --run runs/my"),
        ("inspect", export.inspect, "muster inspect runs/my/adapter"),
        ("merge", export.merge, "muster merge --run runs/my --out my-merged"),
        ("push", export.push, "muster push me/my-adapter --run runs/my --private"),
    ),
    "Clean up": (
        ("rm", remove.rm, "muster rm runs/my"),
        ("gc", remove.gc, "muster gc runs"),
    ),
}
"""Every command under its heading in the help: its name, the function, and an example to copy."""

app = typer.Typer(
    name="muster",
    cls=Group,
    help="Fine-tune language models over many nodes: exact data order, resumable anywhere.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for heading, commands in COMMANDS.items():
    for name, command, example in commands:
        app.command(name, cls=Command, epilog=example, rich_help_panel=heading)(command)


def print_version(asked: bool) -> None:
    if asked:
        from trainer.run.frozen import code_version

        print(f"muster {code_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Fine-tune language models over many nodes: exact data order, resumable anywhere."""


class ToStderr(logging.Handler):
    """Writes to the current ``sys.stderr``, which a live display replaces while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(shown(self.format(record)), file=sys.stderr)


def main(words: Sequence[str] | None = None, report: Callable[[MusterError], None] = print_error) -> None:
    """Ends the process with the designed exit codes: 0 done, 1 failed, 2 usage, 3 interrupted and resumable. ``words``:
    by default those of the command line. ``report``: is given the command's failure."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, handlers=[ToStderr()])
    mute_libraries()
    sys.exit(carried_out(lambda: app(words, prog_name="muster"), report))
