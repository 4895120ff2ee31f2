"""Everything is declared in pyproject.toml; the CUDA extension of csrc/ will be declared here."""

from setuptools import setup

setup()
