"""How a config's fields are checked on construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffprune.errors import InputError


def expect(condition: Any, config: Any, name: str, expected: str) -> None:
    """Raise InputError, naming the field and its value, unless ``condition``."""
    if not condition:
        raise InputError(f"{type(config).__name__}.{name}: expected {expected}, got {getattr(config, name)!r}")


def as_known(name: str, known: Sequence[Any]) -> str:
    """A name as those ``known`` spell it: bf16 and bfloat16 are one."""
    other = {"bf16": "bfloat16", "bfloat16": "bf16"}.get(name)
    return other if other in known and name not in known else name
