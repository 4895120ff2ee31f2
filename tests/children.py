"""Forked children that are killed, or come to their own end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


def fork(work: Callable[[], Any]) -> int:
    """A child that finds everything imported, so that it is at work at once."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(child: int, wait: bool) -> bool:
    """Whether the child has come to its own end; SystemExit if that was an error."""
    found, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    if not found or os.WIFSIGNALED(status):
        return False
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("a stage failed that should have gone on")
    return True
