"""One HTML page that shows what was scored, what was kept, and what a model trained on it makes of it."""

from __future__ import annotations

from diffprune.reporting.build import report

__all__ = ["report"]
