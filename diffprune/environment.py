"""What the libraries below read from the environment when they begin: as the command line wants it."""

from __future__ import annotations

import os


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


def _made_by_intel() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "").rstrip().endswith("GenuineIntel")
    except OSError:  # not Linux
        return False
