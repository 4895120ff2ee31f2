"""What test_local_workers.py has worker processes hold: small, and quick to import."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from diffprune.errors import InputError


@dataclass(frozen=True)
class Squares:
    """Writes the square of a number into a file, and misbehaves where it is told to."""

    folder: Path
    dies_at: str = ""  # a shard
    times: int = 0

    def __call__(self) -> Squares:
        return self

    def square(self, shard: str, number: int, advance) -> int:
        log(self.folder, f"begin {shard}")
        advance(1)
        if shard == self.dies_at and sum(line == f"begin {shard}" for line in lines(self.folder)) <= self.times:
            time.sleep(0.05)  # the driver has heard of the progress
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / f"{shard}.txt").write_text(str(number * number))
        advance(1)
        log(self.folder, f"end {shard}")
        return number * number

    def wait_for(self, shard: str, other: str, advance) -> None:
        """Ends once another shard has begun, or after half a second."""
        log(self.folder, f"begin {shard}")
        end = time.monotonic() + 0.5
        while other and f"begin {other}" not in lines(self.folder) and time.monotonic() < end:
            time.sleep(0.005)
        log(self.folder, f"end {shard}")

    def slow_once(self, shard: str, advance) -> str:
        """A minute for the first one, no time for the second."""
        log(self.folder, f"begin {shard}")
        if sum(line == f"begin {shard}" for line in lines(self.folder)) > 1:
            return "copy"
        time.sleep(60)
        return "first"

    def threads(self, advance) -> str:
        return os.environ["OMP_NUM_THREADS"]

    def refuse(self, shard: str, advance) -> None:
        raise InputError(f"{shard}: refused")

    def raise_unpicklable(self, advance) -> None:
        raise Unpicklable(1, 2)


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@dataclass(frozen=True)
class Hopeless:
    """Dies before it is there."""

    def __call__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Sleeper:
    """Tells its process id, and sleeps."""

    folder: Path

    def __call__(self) -> Sleeper:
        return self

    def sleep(self, shard: str, advance) -> None:
        log(self.folder, f"pid {os.getpid()}")
        time.sleep(60)


def log(folder: Path, line: str) -> None:
    with open(folder / "log", "a") as file:
        file.write(f"{line}\n")


def lines(folder: Path) -> list[str]:
    path = folder / "log"
    return path.read_text().splitlines() if path.is_file() else []
