"""How a verb's result reaches the user: a short table, or JSON; and how an error does."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import typer

from diffprune.errors import DiffpruneError, InputError
from diffprune.outputs import is_stdout, is_stream
from diffprune.progress import set_enabled

INTERRUPTED = 130  # as shells say it: 128 and the number of the signal
TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send some time before SIGKILL."""


def run(
    function: Callable[..., dict[str, Any]],
    *args: Any,
    as_json: bool,
    writes: Path | Sequence[Path | None] | None = None,
    display: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Call a public function and print its result. What a user can mend ends as one line and exit code 1.

    ``writes``: the files that the function writes. Where one is standard output, the result goes to standard error.
    """
    written = [path for path in (writes if isinstance(writes, Sequence) else [writes]) if path is not None]
    set_enabled((not as_json or sys.stderr.isatty()) and os.environ.get("RANK", "0") == "0")
    try:
        if sum(map(is_stdout, written)) > 1:
            raise InputError("two outputs are standard output: give one of them a name")
        with _hearing_sigterm():
            result = function(*args, **options)
    except KeyboardInterrupt as stop:
        how, code = ("ended by SIGTERM", TERMINATED) if isinstance(stop, Terminated) else ("interrupted", INTERRUPTED)
        _fail(f"{how}: what is finished is kept; run the same command again to finish the rest", code)
    except DiffpruneError as error:
        _fail(str(error), 1)
    except UnicodeEncodeError as error:  # of a path or a name, which files of results cannot hold
        near = error.object[max(error.start - 40, 0) : error.end + 40]
        _fail(f"{near!a}: expected a name or path in UTF-8, found other bytes in it; rename it", 1)
    except OSError as error:  # a full disk, a read-only folder, a file that vanished: the message names the file
        if isinstance(error, BrokenPipeError) and any(map(is_stream, written)):
            raise  # who reads has had enough, as `head`: typer ends without a word
        _fail(str(error), 1)
    if os.environ.get("RANK", "0") != "0":  # torchrun's other processes: the first one speaks
        return result
    try:
        with redirect_stdout(sys.stderr) if any(map(is_stdout, written)) else nullcontext():
            if as_json:
                is_unicode = "utf" in (sys.stdout.encoding or "").lower()
                print(json.dumps(result, indent=2, ensure_ascii=not is_unicode, default=str), flush=True)
            else:
                (display or show)(result)
    except BrokenPipeError:
        raise
    except OSError as error:  # standard output goes to a disk that is full
        _fail(f"the result could not be printed ({error}); what it is about is done", 1)
    return result


@contextmanager
def _hearing_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: nothing is left half-written, parts of uploads neither. A second one ends
    the process at once. torchrun's processes leave it as it is: they may wait for each other.
    """
    alone = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def show(result: dict[str, Any]) -> None:
    """Print the counts of a result as two aligned columns; nested values are folded to one line."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in result.items():
        if value is not None and value != []:
            table.add_row(f"[dim]{key.replace('_', ' ')}[/dim]", escape(_text(value)))
    console.print(table)
    failed, first = result.get("failed"), result.get("first_error")
    if failed and first:  # of a stage, which has written tables
        console.print(
            f"[yellow]{failed:,} of {result['samples']:,} samples failed[/yellow]; they are in the tables, with status "
            f"and error. First: {escape(str(first['key']))}: {escape(str(first['error']))}"
        )
    elif failed:
        console.print(f"[yellow]samples that failed, and are left out: {failed:,}[/yellow]")


def show_doctor(found: dict[str, Any]) -> None:
    """Print what ``doctor`` found: the machine, then a row per op; reasons that recur are numbered below the table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    show({name: value for name, value in found.items() if name not in ("ops", "orders")})
    places: dict[str, list[int]] = {}
    for implementations in found["ops"].values():
        for place, name in enumerate(implementations):
            places.setdefault(name, []).append(place)
    names = sorted(places, key=lambda name: (max(places[name]), len(places[name])))  # as they are tried
    reasons: list[str] = []
    table = Table("op", *names, box=None, pad_edge=False, header_style="bold")
    for op, implementations in found["ops"].items():
        cells = []
        for name in names:
            said = implementations.get(name, "")
            if said not in ("", "runs"):
                reasons += [said] if said not in reasons else []
                said = f"{'by name' if said.startswith('runs') else 'no'} ({reasons.index(said) + 1})"
            cells.append(said)
        table.add_row(op, *cells)
    console = Console(soft_wrap=True)
    console.print()
    console.print(table)
    for number, reason in enumerate(reasons, start=1):
        console.print(f"[dim]({number}) {escape(reason)}[/dim]")
    for op, order in found["orders"].items():
        console.print(f"[dim]{op} tries {escape(order)}[/dim]")


def show_evaluation(result: dict[str, Any]) -> None:
    """Print the metrics of ``evaluate``, what they were computed from, and its flags; the file has the rest."""
    from rich.console import Console
    from rich.markup import escape

    if "metrics" not in result:  # a dry run
        show(result)
        return
    context = result["context"]
    sampling, reference, embedder = context["sampling"] or {}, context["reference"], context["embedder"]
    how = {name: sampling[name] for name in ("method", "steps", "guidance", "seed") if name in sampling}
    weights = str(embedder.get("model_sha256"))[:12]
    facts = {
        "samples": f"{_text(context['samples']['count'])}  {_text(how)}",
        "reference": f"{_text(reference['count'])}  {reference['split']}  {reference['path']}",
        "embedder": f"{embedder.get('model')}  {weights}  {embedder['dimensions']} numbers",
    }
    show({"name": result["name"], **result["metrics"], **facts, "out": result["out"]})
    console = Console(soft_wrap=True)
    for flag in context["flags"]:
        console.print(f"[yellow]note:[/yellow] {escape(flag)}")


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return "  ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_text(item) for item in value[:10])
        return shown + (f", … ({len(value):,} in all)" if len(value) > 10 else "")
    return str(value)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)
