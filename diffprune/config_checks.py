"""How a config's fields are checked on construction."""

from __future__ import annotations

from typing import Any

from diffprune.errors import InputError


def expect(condition: Any, config: Any, name: str, expected: str) -> None:
    """Raise InputError, naming the field and its value, unless ``condition``."""
    if not condition:
        raise InputError(f"{type(config).__name__}.{name}: expected {expected}, got {getattr(config, name)!r}")
