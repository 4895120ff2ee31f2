"""SIGKILL at random moments in every stage, driver and workers alike; then the run goes on to the same bytes.

    python -m tests.soak.kills --kills 50

Each stage runs in children of this process, alone and with two worker processes, and is killed: at a random time, or a
moment after a random file has been finished. Then it is run again, until it is done, and looked at: the bytes of an
undisturbed run, no temporary file, and nothing written again that had been finished. ``test_kills.py`` is the short
form.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import small_run
from children import ended, fork
from small_run import DIT_OVERRIDES, VQVAE_OVERRIDES, SmallRun, write_digits
from soak_options import soak_parser

SHARDS = 6
METHODS = ("loss", "el2n", "grand", "moso", "monotonicity", "random")


@dataclass(frozen=True)
class Stage:
    """``run(out, workers)``; what it finishes one by one matches ``pieces``; ``workers``: whether it takes them."""

    name: str
    run: Callable[[Path, int], Any]
    pieces: str
    workers: bool = True


@dataclass
class Count:
    """Of one stage: kills that hit a process at work, of a driver and of workers; and what was found wrong after."""

    drivers: int = 0
    workers: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)


def stages(small: SmallRun) -> list[Stage]:
    """All of them, over what the stage before has made in ``small``."""
    import diffprune
    from diffprune.config import load_config

    steps = ["train.steps=12", "train.checkpoint_every=2", "train.batch_size=8"]
    dit = load_config(None, "dit", [*DIT_OVERRIDES, *steps])
    shards, kept = small.shards, small.root / "kept.parquet"
    options = {"methods": METHODS, "draws": 2, "normalise_t": True, "device": "cpu", "batch_size": 16}

    def pack(out: Path, workers: int) -> Any:
        return diffprune.pack(small.images, out, shard_size=20, workers=workers)

    def encode(out: Path, workers: int) -> Any:
        return diffprune.encode(shards, small.vqvae, out, workers=workers)

    def embed(out: Path, workers: int) -> Any:
        return diffprune.embed(shards, out, model=f"vqvae:{small.vqvae}", workers=workers)

    def score(out: Path, workers: int) -> Any:
        return diffprune.score(small.latents, small.surrogate, out, workers=workers, **options)

    def cluster(out: Path, _: int) -> Any:
        return diffprune.cluster(small.embeddings, out, k=12, tol=0)

    def prune(out: Path, workers: int) -> Any:
        return diffprune.prune(kept, shards, out, shard_size=10, workers=workers)

    def sample(out: Path, workers: int) -> Any:
        return diffprune.sample(
            small.surrogate, small.vqvae, out, count=60, shard_size=10, steps=4, grid=out / "grid.png", workers=workers
        )

    def train(out: Path, _: int) -> Any:
        return diffprune.train_dit(dit, small.latents, out)

    return [
        Stage("pack", pack, "*.tar"),
        Stage("encode", encode, "*.parquet"),
        Stage("embed", embed, "*.parquet"),
        Stage("score", score, "*.parquet"),
        Stage("cluster", cluster, "*.parquet", workers=False),
        Stage("prune", prune, "*.tar", workers=False),
        Stage("sample", sample, "*.tar"),
        Stage("train", train, "step_*/model.safetensors", workers=False),
    ]


def prepare(root: Path) -> SmallRun:
    """Everything that the stages read."""
    import diffprune
    from diffprune.config import load_config

    small = SmallRun(root)
    write_digits(small.images, count=20 * SHARDS)
    diffprune.pack(small.images, small.shards, shard_size=20)
    diffprune.train_vqvae(load_config(None, "vqvae", VQVAE_OVERRIDES), small.shards, small.vqvae)
    diffprune.encode(small.shards, small.vqvae, small.latents)
    diffprune.embed(small.shards, small.embeddings, model=f"vqvae:{small.vqvae}")
    diffprune.train_dit(load_config(None, "dit", DIT_OVERRIDES), small.latents, small.surrogate)
    diffprune.score(small.latents, small.surrogate, small.scores, methods=("loss",))
    diffprune.select(small.scores, root / "kept.parquet", by="loss", keep=0.5)
    return small


def kill_stage(stage: Stage, root: Path, kills: int, worker_kills: int, seed: int) -> Count:
    """``kills`` of runs in one process; ``worker_kills`` of runs with two workers, every second one of a worker."""
    rng, count = random.Random(f"{seed} {stage.name}"), Count()
    whole = root / f"{stage.name}-whole"
    stage.run(whole, 1)
    expected = contents(whole)
    for workers, wanted in ((1, kills), (2, worker_kills if stage.workers else 0)):
        if not wanted:
            continue
        done, number = 0, 0
        began = time.monotonic()
        finish(stage, root / f"{stage.name}-warm-{workers}", workers)
        took = time.monotonic() - began
        while done < wanted:
            out = root / f"{stage.name}-{workers}-{number}"
            hit = kill_once(stage, out, workers, took, len(expected), rng, count, victim=done % 2 if workers > 1 else 0)
            done += hit is not None
            if hit != "driver":  # the run came to its end
                check(stage, out, expected, count)
                number += 1
        out = root / f"{stage.name}-{workers}-{number}"
        before = finished(out, stage.pieces)
        finish(stage, out, workers)
        check(stage, out, expected, count, before)
    return count


def kill_once(
    stage: Stage, out: Path, workers: int, took: float, files: int, rng: random.Random, count: Count, victim: int
) -> str | None:
    """Start it and kill the driver (``victim`` 0) or one of its workers (1). Returns who was hit, if anyone.

    With a worker killed, or nobody, the run is waited for.
    """
    before = finished(out, stage.pieces)
    child = fork(lambda: stage.run(out, workers))
    wait_for_moment(child, out, stage.pieces, took, files, rng)
    if victim:
        hit = None
        found = workers_of(child)
        if found:
            os.kill(rng.choice(found), signal.SIGKILL)
            hit = "worker"
        ended(child, wait=True)
        count.workers += hit is not None
    else:
        hit = None
        if not ended(child, wait=False):
            os.kill(child, signal.SIGKILL)
            hit = None if ended(child, wait=True) else "driver"
            count.drivers += hit is not None
    count.runs += 1
    unchanged(stage, out, before, count)
    return hit


def wait_for_moment(child: int, out: Path, pieces: str, took: float, files: int, rng: random.Random) -> None:
    """A random time of the run; or a random number of its files, and a moment more."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, took))
        return
    wanted, end = len(finished(out, pieces)) + rng.randint(0, max(1, files // 2)), time.monotonic() + took
    while len(finished(out, pieces)) < wanted and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.01))


def check(
    stage: Stage, out: Path, expected: dict[str, bytes], count: Count, before: dict[str, tuple] | None = None
) -> None:
    """What is wrong with a run that came to its end."""
    found = contents(out)
    count.lost += [f"{stage.name}: {name} is missing" for name in sorted(expected.keys() - found.keys())]
    count.lost += [f"{stage.name}: {name} was left behind" for name in sorted(found.keys() - expected.keys())]
    different = [name for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
    count.lost += [f"{stage.name}: {name} has other bytes" for name in different]
    if before is not None:
        unchanged(stage, out, before, count)
    shutil.rmtree(out)


def unchanged(stage: Stage, out: Path, before: dict[str, tuple], count: Count) -> None:
    """Whether what had been finished is as it was, and not written again."""
    after = finished(out, stage.pieces)
    count.lost += [f"{stage.name}: {name} was done twice" for name in before if after.get(name) != before[name]]


def finished(out: Path, pieces: str) -> dict[str, tuple]:
    """Finished files, and which file it is: of another one, written later, the number or the time differ."""
    found = {}
    for path in out.glob(pieces):
        if not any(part.startswith(".tmp-") for part in path.relative_to(out).parts):
            about = path.stat()
            found[str(path.relative_to(out))] = (about.st_ino, about.st_mtime_ns)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; of a log of training, without times."""
    found = small_run.contents(folder)
    if "log.jsonl" in found:
        lines = [json.loads(line) for line in found["log.jsonl"].decode().splitlines()]
        told = [
            {name: value for name, value in line.items() if name not in ("images_per_second", "mfu")} for line in lines
        ]
        found["log.jsonl"] = json.dumps(told).encode()
    return found


def workers_of(driver: int) -> list[int]:
    """The worker processes of a driver."""
    try:
        children = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
        commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    except OSError:
        return []
    return [child for child, command in commands.items() if b"spawn_main" in command]


def finish(stage: Stage, out: Path, workers: int) -> None:
    ended(fork(lambda: stage.run(out, workers)), wait=True)


def main() -> None:
    parser = soak_parser(__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each stage: half of them with workers, if it has any")
    parser.add_argument("--worker-kills", type=int, help="of those, with workers")
    parser.add_argument("--stages", default="pack,encode,embed,score,cluster,prune,sample,train")
    arguments = parser.parse_args()
    import diffprune.progress

    diffprune.progress.set_enabled(False)
    began = time.monotonic()
    counts: dict[str, Count] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small = prepare(root / "small")
        for stage in stages(small):
            if stage.name not in arguments.stages.split(","):
                continue
            with_workers = arguments.kills // 2 if arguments.worker_kills is None else arguments.worker_kills
            with_workers = with_workers if stage.workers else 0
            counts[stage.name] = kill_stage(stage, root, arguments.kills - with_workers, with_workers, arguments.seed)
    print(f"{'stage':<10}{'drivers killed':>16}{'workers killed':>16}{'survived':>10}{'lost':>6}")
    for name, count in counts.items():
        tried = count.drivers + count.workers
        survived = tried if not count.lost else 0
        print(f"{name:<10}{count.drivers:>16}{count.workers:>16}{survived:>10}{len(count.lost):>6}")
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.json:
        told = {name: vars(count) for name, count in counts.items()}
        arguments.json.write_text(json.dumps({"stages": told, "seconds": time.monotonic() - began}))
    lost = [line for count in counts.values() for line in count.lost]
    print("\n".join(lost[:50]))
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
