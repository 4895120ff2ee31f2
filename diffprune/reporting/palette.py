"""One colour for each method, in every figure and table of a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Series colours live in the page's style sheet as --series-0 ..., once for light and once for dark pages. They were
# searched for the largest smallest distance (OKLab) over normal, deuteranopic, protanopic and tritanopic sight, at
# a contrast of 3 or more on the page.
SERIES = 7
NEUTRAL = "var(--neutral)"


class Palette:
    """CSS colours by name, given out in order of first use; ``aliases`` names share the colour of what they name."""

    def __init__(self, names: Iterable[str], aliases: Mapping[str, str], neutral: Iterable[str] = ()) -> None:
        self._aliases, self._neutral = aliases, frozenset(neutral)
        coloured = dict.fromkeys(aliases.get(name, name) for name in names if name not in self._neutral)
        self._slots = {name: slot for slot, name in enumerate(coloured)}

    def __call__(self, name: str) -> str:
        """A CSS colour such as ``var(--series-2)``; the same again from the eighth method on."""
        if name in self._neutral:
            return NEUTRAL
        return f"var(--series-{self._slots[self._aliases.get(name, name)] % SERIES})"
