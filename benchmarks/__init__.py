"""Benchmarks: ``python -m benchmarks.gpu`` on a GPU, ``make bench`` on a CPU."""
