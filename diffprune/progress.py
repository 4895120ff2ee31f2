"""Progress of long work: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_LINE_SECONDS = 10.0
_enabled = True


class Progress(Protocol):
    """What ``progress`` yields."""

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """``amount`` more units are done; ``note`` is shown beside the count until the next one. For any thread."""


def set_enabled(enabled: bool) -> None:
    """Switch all progress output on or off (the command line's ``--quiet``)."""
    global _enabled
    _enabled = enabled


@contextmanager
def quiet() -> Iterator[None]:
    """No progress output inside: of the parts of something whose own progress is shown."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@contextmanager
def progress(title: str, *, total: int, unit: str) -> Iterator[Progress]:
    """Show how far a loop over ``total`` units is, on stderr."""
    if not _enabled or sys.stderr is None:  # None: it is closed
        yield _Silent()
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with RichProgress(*columns, console=Console(stderr=True)) as display:
            yield _Bar(display, title, total, unit)
    else:
        plain = _Plain(title, total, unit)
        yield plain
        plain.finish()


class _Silent:
    def advance(self, amount: int = 1, *, note: str = "") -> None:
        pass


class _Bar:
    def __init__(self, display, title: str, total: int, unit: str) -> None:
        self.display, self.unit, self.done, self.start = display, unit, 0, time.monotonic()
        self.task = display.add_task(title, total=total, rate="", note="")
        self.lock = threading.Lock()

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        with self.lock:
            self.done += amount
            rate = f"{self.done / max(time.monotonic() - self.start, 1e-9):,.0f} {self.unit}/s"
            self.display.update(self.task, advance=amount, rate=rate, note=note)


class _Plain:
    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.note = 0, ""
        self.start = self.last = time.monotonic()
        self.lock = threading.Lock()

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        with self.lock:
            self.done, self.note = self.done + amount, note
            now = time.monotonic()
            if now - self.last >= PLAIN_LINE_SECONDS:
                self.last = now
                self._print()

    def finish(self) -> None:
        self._print()

    def _print(self) -> None:
        seconds = time.monotonic() - self.start
        rate = self.done / max(seconds, 1e-9)
        note = f"  {self.note}" if self.note else ""
        print(
            f"{self.title}: {self.done:,}/{self.total:,} {self.unit}  {seconds:.0f} s  {rate:,.0f}/s{note}",
            file=sys.stderr,
            flush=True,
        )
