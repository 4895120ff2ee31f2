"""Classes of the verbs' commands: strict about options given twice, and with help that cuts no name at 80 columns."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class Verb(TyperCommand):
    """A command each of whose options is given once, unless several values are meant, or none, as of --json.

    click would take the last one silently.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        *_, given = self.make_parser(ctx).parse_args(list(args))
        for one, times in Counter(given).items():
            if times > 1 and one.param_type_name == "option" and not (one.multiple or one.is_flag):
                message = f"given {times} times, it takes one value"
                raise typer.BadParameter(message, ctx=ctx, param_hint=one.opts[0])
        return super().parse_args(ctx, args)

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for one in self.get_params(ctx):
            title = "Arguments" if one.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(one, "rich_help_panel", None) or title, []).append(one.get_help_record(ctx))
        _write(panels, formatter)


class Verbs(TyperGroup):
    """A group that lists its commands by panel."""

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panels.setdefault(command.rich_help_panel or "Commands", []).append((name, command.get_short_help_str(200)))
        _write(panels, formatter)


def _write(panels: dict[str, list[tuple[str, str]]], formatter: Any) -> None:
    for title, records in panels.items():
        with formatter.section(title):
            formatter.write_dl(records)
