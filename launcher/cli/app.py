"""The command line: ``muster …`` and ``python -m launcher …`` are this program.

Results go to stdout, everything else to stderr. Nothing heavy is imported before a command needs it: the modules here
have the options, and each command imports what it calls.
"""

from __future__ import annotations

import logging
import sys

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
    report,
    run,
    status,
    submit,
)
from launcher.cli import validate as validation
from launcher.cli.exit_codes import carried_out
from trainer.terminal import LOG_FORMAT, shown

app = typer.Typer(
    name="muster",
    help="Fine-tune language models over many nodes: exact data order, resumable anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(init.init)
app.command()(run.run)
app.command()(validation.validate)
app.command()(validation.schema)
app.command()(matrix.matrix)
app.command()(status.status)
app.command("ls")(status.list_)
app.command()(status.logs)
app.command()(status.track)
app.command()(report.report)
app.command()(convert.convert)
app.command()(preview.preview)
app.command()(prepare.prepare)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.command()(evaluate.evaluate)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(export.inspect)
app.command()(export.merge)
app.command()(export.push)
app.command()(submit.render)
app.command()(submit.cancel)


class ToStderr(logging.Handler):
    """Writes to the current ``sys.stderr``, which a live display replaces while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(shown(self.format(record)), file=sys.stderr)


def main() -> None:
    """Ends the process with the designed exit codes: 0 done, 1 failed, 2 usage, 3 interrupted and resumable."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, handlers=[ToStderr()])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that nothing here calls
    sys.exit(carried_out(lambda: app(standalone_mode=True)))
