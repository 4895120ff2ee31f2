"""Benchmarks: ``python -m benchmarks.gpu`` on a GPU, ``make bench`` on a CPU."""

from diffprune.environment import prepare

prepare()  # as the `diffprune` command does, for whatever it is compared with
