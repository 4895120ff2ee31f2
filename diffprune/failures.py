"""When so many samples in a row fail that something bigger than single images is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa

from diffprune.errors import StoppedError

MAX_FAILURES = 100


@dataclass(frozen=True)
class Tally:
    """How the samples of one shard fared: how many there are and failed, and how many in a row failed at its
    beginning, at its end, and at most; with the first failure's key and error."""

    samples: int
    failed: int
    leading: int
    trailing: int
    longest: int
    key: str | None = None
    error: str | None = None

    @classmethod
    def of(cls, table: pa.Table, counts: Sequence[bool] | None = None) -> Tally:
        """Of a table with key, status and error; of the rows that count, if not all do."""
        failed = [status == "failed" for status in table["status"].to_pylist()]
        counted = failed if counts is None else [bad for bad, count in zip(failed, counts, strict=True) if count]
        runs = [(bad, len(list(group))) for bad, group in groupby(counted)]
        lengths = [length for bad, length in runs if bad]
        key = error = None
        if lengths:
            row = next(i for i, bad in enumerate(failed) if bad and (counts is None or counts[i]))
            key, error = table["key"][row].as_py(), table["error"][row].as_py()
        return cls(
            samples=len(counted),
            failed=sum(lengths),
            leading=runs[0][1] if runs and runs[0][0] else 0,
            trailing=runs[-1][1] if runs and runs[-1][0] else 0,
            longest=max(lengths, default=0),
            key=key,
            error=error,
        )

    @property
    def all_failed(self) -> bool:
        """Of a shard without samples too: it does not end a row of failures."""
        return self.failed == self.samples


class Streaks:
    """Counts failures in a row over the samples of shards, in shard order, in whatever order the shards come."""

    def __init__(self, shards: Sequence[str], limit: int) -> None:
        """``limit`` 0: never too many."""
        self._place = {shard: place for place, shard in enumerate(shards)}
        self._tallies: dict[int, Tally] = {}
        self._limit = limit

    def add(self, shard: str, tally: Tally) -> None:
        """Raises StoppedError if this shard makes a row of ``limit`` failures."""
        place = self._place[shard]
        self._tallies[place] = tally
        before, after = self._run(place - 1, -1), self._run(place + 1, 1)
        if tally.all_failed:
            longest = before + tally.samples + after
        else:
            longest = max(tally.longest, before + tally.leading, tally.trailing + after)
        if self._limit and longest >= self._limit:
            near = sorted(self._tallies, key=lambda other: abs(other - place))  # this one may have no samples at all
            example = next(self._tallies[other] for other in near if self._tallies[other].failed)
            raise StoppedError(
                f"shard {shard}: {longest} samples in a row failed, such as key {example.key!r}: {example.error}. So "
                "many are no accident: look at the model, the device, the disk, and these shards. Finished shards are "
                f"kept. If the images are that bad, go on with --max-failures above {longest}, or 0 for any number"
            )

    def _run(self, place: int, step: int) -> int:
        """Failures in a row from the near end of the shard at ``place`` on, away from where one comes from."""
        found = 0
        while (tally := self._tallies.get(place)) is not None and found < self._limit:
            found += tally.leading if step > 0 else tally.trailing
            if not tally.all_failed:
                break
            place += step
        return found
