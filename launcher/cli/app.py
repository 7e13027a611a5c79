"""The command line: ``muster …`` and ``python -m launcher …`` are this program.

Results go to stdout, everything else to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from launcher.cli import convert, doctor, evaluate, export, generate, plan, prepare, report, status
from launcher.cli import submit as submit_commands
from launcher.cli.options import TrustOption
from launcher.submit import submit
from launcher.submit.place import choose_place
from launcher.terminal import vllm_command
from launcher.terminal.console import Console, own_streams, stderr, stdout
from trainer.errors import Interrupted, MusterError, RecipeError, StartAgain, UsageError
from trainer.interruption import CODE, current
from trainer.run.recipe_url import recipe_at
from trainer.terminal import LOG_FORMAT, shown

if TYPE_CHECKING:
    from trainer.recipe import Recipe

KEYBOARD = 130
"""The exit code that typer makes of a KeyboardInterrupt."""
RESUMES = "the same command resumes from the newest checkpoint"
ROOT = Path(__file__).resolve().parents[2]

app = typer.Typer(
    name="muster",
    help="Fine-tune language models over many nodes: exact data order, resumable anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe: YAML or JSON file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes, by dotted path")]


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on: Annotated[
        str | None, typer.Option(help="local | ray | slurm | kubernetes: where to run; without it, RAY_ADDRESS decides")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="of the Ray cluster: http://HEAD:8265 submits a job there, HOST:PORT joins it")
    ] = None,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="take the run from a driver that still holds it")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="after submitting a job, do not wait for it; exit code 0 means submitted")
    ] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train RECIPE to its end. Running it again resumes it."""
    console = stderr()
    loaded = recipe_at(recipe, overrides or [], trust=trust_remote_code)
    place = choose_place(on, address, loaded)
    if place is not None:
        submit.run_elsewhere(loaded, place, ["--takeover"] if takeover else [], address, detach=detach)
        return
    from launcher.driver.driver import run as drive
    from launcher.monitor.progress import Progress

    current.command(RESUMES)
    try:
        adapter = drive(loaded, Progress(console), takeover=takeover)
    except KeyboardInterrupt:  # typer would make an exit code of its own of it
        raise Interrupted(current.sentence() if current.heard else RESUMES) from None
    for line in vllm_command.of_recipe(loaded, adapter):
        console.print(Text(f"serve it:  {line}"), soft_wrap=True)
    console.print(Text(f"finished: the adapter is {adapter}"), soft_wrap=True)


@app.command()
def validate(
    recipes: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help="recipes to check")] = None,
    shipped: Annotated[bool, typer.Option("--all", help="check every recipe that muster ships")] = False,
    inputs: Annotated[bool, typer.Option("--inputs", help="contact model, data and storage as well")] = False,
) -> None:
    """Report every mistake of each RECIPE, with its line. Nothing is created, and nothing is contacted without
    --inputs."""
    from trainer.recipe import load

    paths = [*(recipes or []), *(sorted(map(str, (ROOT / "recipes").glob("*.yaml"))) if shipped else [])]
    if not paths:
        raise UsageError("name a recipe to validate, or --all")
    console, failed = stderr(), False
    for path in paths:
        try:
            loaded = load(path)
            if inputs:
                _check_inputs(loaded, console)
            console.print(Text(f"ok  {path}"), soft_wrap=True)
        except UsageError as error:
            failed = True
            console.print(Text(error_text(error, path)), soft_wrap=True)
    if failed:
        raise typer.Exit(2)


def _check_inputs(recipe: Recipe, console: Console) -> None:
    from launcher.driver.driver import check_inputs
    from launcher.monitor.progress import Progress

    check_inputs(recipe, Progress(console))


def error_text(error: MusterError, path: str | None = None) -> str:
    if isinstance(error, RecipeError):
        count = len(error.mistakes)
        return f"{error}\n{count} mistake{'s' if count > 1 else ''}"
    return f"{path}: {error}" if path else str(error)


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from trainer.recipe import schema as recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def matrix(
    task: Annotated[str | None, typer.Option(help="of this task alone")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="all cells as a JSON list on stdout")] = False,
) -> None:
    """Show which method, quantisation, strategy and task work together."""
    from launcher.cli import matrix as matrix_text
    from trainer.recipe.matrix import REFUSALS, alike
    from trainer.recipe.tasks import TASKS

    tasks = TASKS.names()
    if task is not None:
        TASKS[task]  # raises UsageError for an unknown name
        tasks = (task,)
    if as_json:
        print(json.dumps(matrix_text.as_rows(tasks)))
        return
    console = stdout(width=min(matrix_text.WIDTH, stdout().width))
    for group in alike(tasks):
        console.print(matrix_text.matrix_table(group))
    console.print(matrix_text.legend())
    console.print(matrix_text.reasons(tuple(r for r in REFUSALS if not r.task or set(r.values("task")) & set(tasks))))


app.command()(status.status)
app.command("ls")(status.list_)
app.command()(status.logs)
app.command()(status.track)
app.command()(report.report)
app.command()(convert.convert)
app.command()(prepare.prepare)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.command()(evaluate.evaluate)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(export.inspect)
app.command()(export.merge)
app.command()(export.push)
app.command()(submit_commands.render)
app.command()(submit_commands.cancel)


class ToStderr(logging.Handler):
    """Writes to the current ``sys.stderr``, which a live display replaces while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(shown(self.format(record)), file=sys.stderr)


def main() -> None:
    """Ends the process with the designed exit codes: 0 done, 1 failed, 2 usage, 3 interrupted and resumable."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, handlers=[ToStderr()])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that nothing here calls
    sys.exit(carried_out(lambda: app(standalone_mode=True)))


def carried_out(command: Callable[[], int | None]) -> int:
    """Calls a command, reports its failure, and returns its exit code; the process must end afterwards. After a signal,
    any error counts as its consequence: other processes may have received the signal too."""
    current.command("the same command does it again")
    try:
        with own_streams():
            code = _code_of(command)
            if code:
                sys.exit(code)  # so that what has failed keeps its code where nobody reads its output
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    current.settle(code)
    return code


def _code_of(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except MusterError as error:
        interrupted = isinstance(error, Interrupted)
        if current.heard:
            current.leave(error_text(error) if interrupted else f"{current.sentence()} ({error.cause})")
        print(shown(f"muster: {'interrupted' if interrupted else 'error'}: {error_text(error)}"), file=sys.stderr)
        return exit_code(error)
    except SystemExit as ended:
        if current.heard and ended.code:
            current.leave()
        if ended.code == KEYBOARD:
            print("muster: interrupted", file=sys.stderr)
            return CODE
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        if current.heard:
            current.leave()
        if not isinstance(error, Exception):
            raise
        print(shown(traceback.format_exc()), end="", file=sys.stderr)
        return 1


def exit_code(error: MusterError) -> int:
    """Returns the error's exit code. ``MUSTER_AGAIN`` may name another code for a run that should be started again, for
    a script that manages the job."""
    again = os.environ.get("MUSTER_AGAIN", "")
    return int(again) if isinstance(error, StartAgain) and again.isdecimal() else error.exit_code
