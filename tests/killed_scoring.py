"""Runs `score` in forked children and kills them: `python killed_scoring.py ROOT`, see test_scoring_kills.py.

The parent has done the undisturbed run, so that a child finds everything imported and starts in milliseconds.
Prints one JSON object: how many kills found a child at work, and which results differ from an undisturbed run's.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from children import ended, fork
from small_run import contents

import diffprune.progress
from diffprune.scoring import METHODS, score

KILLS = 20
OPTIONS = {"methods": METHODS, "draws": 2, "normalise_t": True, "batch_size": 8, "device": "cpu"}


def main(root: Path) -> None:
    diffprune.progress.set_enabled(False)
    run(root, root / "whole")
    start = time.monotonic()
    finish(root, root / "killed-warm")
    took = time.monotonic() - start
    by_time = kill_by_time(root, took)
    by_rename = kill_by_rename(root)
    expected = contents(root / "whole")
    different = [out.name for out in sorted(root.glob("killed-*")) if contents(out) != expected]
    print(json.dumps({"by_time": by_time, "by_rename": by_rename, "different": different, "files": sorted(expected)}))


def kill_by_time(root: Path, took: float) -> int:
    """Kill at random moments; a run that gets to its end is followed by a new one."""
    rng, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        child = fork(lambda number=number: run(root, root / f"killed-{number}"))
        time.sleep(rng.uniform(0, took))
        if ended(child, wait=False):
            number += 1
            continue
        os.kill(child, signal.SIGKILL)
        kills += not ended(child, wait=True)
    finish(root, root / f"killed-{number}")
    return kills


def kill_by_rename(root: Path) -> int:
    """Kill each child around its fourth rename: now just before, now just after, until one gets to its end."""
    out, kills = root / "killed-rename", 0
    while not ended(fork(lambda kills=kills: run(root, out, stop=kills % 2)), wait=True):
        kills += 1
    return kills


def run(root: Path, out: Path, stop: int | None = None) -> None:
    """Killed before (0) or after (1) its fourth rename, if at all."""
    original, calls = os.replace, []

    def replace(*args: object) -> None:
        calls.append(args)
        if stop == 0 and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)
        if stop == 1 and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    if stop is not None:
        os.replace = replace
    score(root / "latents", root / "run", out, **OPTIONS)


def finish(root: Path, out: Path) -> None:
    assert ended(fork(lambda: run(root, out)), wait=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
