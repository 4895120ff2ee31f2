"""Commands that refuse an option given twice where one value is meant: click would take the last one silently."""

from __future__ import annotations

from collections import Counter

import typer
from typer.core import TyperCommand


class OnceCommand(TyperCommand):
    """A command each of whose options is given once, unless several values are meant, or none, as of --json."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        *_, given = self.make_parser(ctx).parse_args(list(args))
        for one, times in Counter(given).items():
            if times > 1 and one.param_type_name == "option" and not (one.multiple or one.is_flag):
                message = f"given {times} times, it takes one value"
                raise typer.BadParameter(message, ctx=ctx, param_hint=one.opts[0])
        return super().parse_args(ctx, args)
