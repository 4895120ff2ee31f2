"""The options that all long tests have."""

from __future__ import annotations

import argparse
from pathlib import Path


def soak_parser(about: str | None) -> argparse.ArgumentParser:
    """``--seed`` and ``--json``, and a script's docstring as its help."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="also write the counts there")
    return made
