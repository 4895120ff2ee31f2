"""What ``by`` may say: one score column, several by their ranks, and the groups inside which to rank.

by     = ranks ["&" column]              rank inside each group of equal values of that column
ranks  = term {"+" term}                 with several terms: the weighted sum of their ranks
term   = [number "*"] ["-"] column       "-" turns a column round: its lowest ranks highest
column = name | "`" any characters "`"   a name is letters, digits, "_", ".", ":" and inner "-"
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from diffprune.errors import InputError

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?=\s*\*))|(?P<name>[^\W\d][\w.:]*(?:-[\w.:]+)*)|`(?P<quoted>[^`]*)`|(?P<sign>[-+*&])|(?P<end>$))"
)
_MEANS = {"number": "number", "name": "column", "quoted": "column", "sign": "sign", "end": "end"}


@dataclass(frozen=True)
class Term:
    """One column of a ranking: its weight, and whether its lowest value ranks highest."""

    column: str
    weight: float
    reversed: bool


@dataclass(frozen=True)
class By:
    """A parsed ``by``: terms whose ranks are summed, and the column whose groups are ranked one by one, or None."""

    terms: tuple[Term, ...]
    group: str | None

    @property
    def columns(self) -> list[str]:
        return [term.column for term in self.terms]


def parse_by(text: str) -> By:
    """Parse ``by``, such as "grand", "grand + 2*el2n", "-distance & label"; InputError points at what is wrong."""
    tokens = _Tokens(text)
    terms = [_term(tokens)]
    while tokens.take("+"):
        terms.append(_term(tokens))
    group = tokens.column("a column to group by") if tokens.take("&") else None
    if tokens.kind != "end":
        tokens.fail("the end, as one grouping is all there is" if group else "'+', '&' or the end")
    names = [term.column for term in terms]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"by {text!r}: column {twice!r} stands in it twice; give it a weight instead, as in 2*{twice}")
    return By(tuple(terms), group)


def combine(by: By, columns: dict[str, np.ndarray]) -> np.ndarray:
    """The values to rank by, [n] float64, of the columns [n]: of one term its values, of several Σ weight·rank.

    Ranks run from 0 (lowest) to n - 1; equal values share the mean of their ranks, so that neither their order nor
    their scale counts.
    """
    if len(by.terms) == 1:
        [term] = by.terms
        return -columns[term.column] if term.reversed else columns[term.column]
    return sum(
        term.weight * mean_ranks(-columns[term.column] if term.reversed else columns[term.column]) for term in by.terms
    )


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """[n] float64: the rank of each value from 0 on, ties at the mean of theirs."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + ends - 1) / 2, ends - starts)
    return ranks


def _term(tokens: _Tokens) -> Term:
    weight = 1.0
    if tokens.kind == "number":
        weight = float(tokens.next())
        if not 0 < weight < float("inf"):
            raise InputError(f"by {tokens.text!r}: expected a weight above 0, got {weight:g}; '-' turns a column round")
        tokens.take("*")
    turned = tokens.take("-")
    return Term(tokens.column("a column"), weight, turned)


class _Tokens:
    """The tokens of a ``by``, one ahead."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.kind, self.value = text, 0, "", ""
        self.next()

    def next(self) -> str:
        """The current token; reads the one after it."""
        value, self.place = self.value, self.position
        found = _TOKEN.match(self.text, self.position)
        if found is None:
            self.place += len(self.text[self.position :]) - len(self.text[self.position :].lstrip())
            self.fail("a column, '+', '*', '-' or '&'")
        self.kind, self.value = _MEANS[found.lastgroup], found[found.lastgroup]
        self.place, self.position = found.start(found.lastgroup), found.end()
        return value

    def take(self, sign: str) -> bool:
        """Whether the current token is this sign; if so, goes on."""
        if self.kind == "sign" and self.value == sign:
            self.next()
            return True
        return False

    def column(self, expected: str) -> str:
        if self.kind != "column" or not self.value:
            self.fail(expected)
        return self.next()

    def fail(self, expected: str) -> None:
        found = repr(self.text[self.place :].split()[0]) if self.text[self.place :].split() else "the end"
        raise InputError(
            f"by: expected {expected} at character {self.place + 1}, found {found}; it reads like "
            f"'grand', 'grand + 2*el2n' or '-distance & label'\n  {self.text}\n  {' ' * self.place}^"
        )
