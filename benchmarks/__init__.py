"""Benchmarks: ``python -m benchmarks.gpu`` on a GPU, ``make bench`` on a CPU."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the `diffprune` command does, for whatever it is compared with
