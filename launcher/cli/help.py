"""The help texts: commands in groups, and each command's arguments, options and example in plain text.

Nothing is cut, whatever the width: a summary that is too long for its line continues on the next one.
"""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup


class Group(TyperGroup):
    """The program: its commands under the headings that they were registered with (``rich_help_panel``)."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        _write_parameters(self, ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            groups.setdefault(command.rich_help_panel, []).append((name, summary(command.help)))
        column = max(len(name) for rows in groups.values() for name, _ in rows)
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(column), text) for name, text in rows])


class Command(TyperCommand):
    """One command. Its ``epilog`` is the example, a line to copy."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        arguments = [_name(param) for param in self.get_params(ctx) if param.param_type_name == "argument"]
        formatter.write_usage(ctx.command_path, " ".join([*arguments, "[OPTIONS]"]))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parameters(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Example"):
                formatter.write(f"  {self.epilog}\n")


def summary(help: str | None) -> str:
    """Returns the beginning of a command's help, up to its first full stop or colon."""
    return re.split(r"[.:](?=\s|$)", " ".join((help or "").split()), maxsplit=1)[0]


def _write_parameters(command: Any, ctx: Any, formatter: Any) -> None:
    sections: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
    for param in command.get_params(ctx):
        if getattr(param, "hidden", False):
            continue
        about, default = param.help or "", param.default
        if isinstance(default, str | int | float) and not isinstance(default, bool):
            about += f" [default: {default}]"
        elif param.required and param.param_type_name == "option":
            about += " [required]"
        sections[param.param_type_name].append((_name(param), about))
    for kind, rows in sections.items():
        if rows:
            with formatter.section(f"{kind.capitalize()}s"):
                formatter.write_dl(rows)


def _name(param: Any) -> str:
    """Returns ``RECIPE`` for an argument, ``--on PLACE`` for an option, ``--json`` for a flag. Without a name of its
    own, a value is called by the last word of its option."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name.upper())
    names = ", ".join(sorted(param.opts, key=len))
    if param.is_flag:
        return names
    return f"{names} {param.metavar or max(param.opts, key=len).split('-')[-1].upper()}"
