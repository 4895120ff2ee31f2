"""What the command line needs of the process: what libraries read when they begin, and streams to print to."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import TextIOWrapper


def prepare() -> None:
    """Set what is not set. To be called before PyTorch's first matrix product.

    - PyTorch takes large CPU tensors as huge pages.
    - MKL rounds a row of a matrix product the same way whatever rows are beside it, for any number of threads ("strict
      conditional numerical reproducibility"). Else a batch of another size, or a worker with fewer threads, gives
      other last bits, on some processors at most sizes. Matrix products take no longer. MKL has it for Intel's alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if _made_by_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def prepare_streams() -> None:
    """Standard streams that can be printed to: closed ones (``2>&-``) print nowhere, and a character that an encoding
    lacks is escaped, not the end.
    """
    for number in range(3):  # else the next file that is opened gets the number, and what is printed
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            with suppress(ValueError):  # a stream that was written to already
                stream.reconfigure(errors="backslashreplace")


def _made_by_intel() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "").rstrip().endswith("GenuineIntel")
    except OSError:  # not Linux
        return False
