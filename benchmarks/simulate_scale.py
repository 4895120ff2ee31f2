"""What a map over shards costs at scale: per-shard costs measured here, and a simulated schedule.

    python -m benchmarks.simulate_scale             # the tables of docs/scale.md
    python -m benchmarks.simulate_scale --measure   # only the costs, measured on this machine

The schedule is simulated as ``LocalWorkers`` and parts run it: shards are handed out in order to whoever is free. A
shard takes its images' time, times a log-normal factor; some shards are stragglers; processes die and their shards
start again. What a model costs on a GPU is NOT measured here: it is a parameter, and the table says so.
"""

from __future__ import annotations

import argparse
import heapq
import io
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Job:
    """A map over ``shards`` by ``workers``. Times in seconds."""

    shards: int
    images: int  # of a shard
    workers: int
    seconds_per_image: float  # of one worker
    seconds_per_shard: float = 0.05  # whatever is done once a shard
    spread: float = 0.1  # sigma of the log-normal factor
    stragglers: float = 0.005  # share of shards
    slowdown: float = 5.0  # of a straggler
    deaths_per_day: float = 0.1  # of one worker
    restart: float = 60.0  # until another one has the model
    reissue: float | None = None  # give a shard to a second worker after so many medians, once no shard is left


@dataclass(frozen=True)
class Schedule:
    """What came of it: hours, worker-hours, the share of those that did work once, and the last shards' hours."""

    hours: float
    worker_hours: float
    useful: float
    tail_hours: float
    redone: int  # shards that a death cost
    reissued: int


def simulate(job: Job, seed: int = 0) -> Schedule:
    """One run of the schedule."""
    rng = np.random.default_rng(seed)
    plain = job.images * job.seconds_per_image + job.seconds_per_shard
    durations = plain * rng.lognormal(-(job.spread**2) / 2, job.spread, job.shards)
    slow = rng.random(job.shards) < job.stragglers
    durations[slow] *= job.slowdown
    death_rate = job.deaths_per_day / 86_400
    free = [(0.0, worker) for worker in range(job.workers)]
    heapq.heapify(free)
    next_shard, again, redone, lost = 0, [], 0, 0.0
    ends: list[tuple[float, float, int]] = []  # when a shard ends, its seconds, itself
    last_start = 0.0
    while next_shard < job.shards or again:
        now, worker = heapq.heappop(free)
        shard = again.pop() if again else next_shard
        next_shard += shard == next_shard
        last_start = max(last_start, now)
        dies_after = rng.exponential(1 / death_rate) if death_rate else np.inf
        if dies_after < durations[shard]:
            again.append(shard)
            redone, lost = redone + 1, lost + dies_after
            heapq.heappush(free, (now + dies_after + job.restart, worker))
            continue
        ends.append((now + durations[shard], durations[shard], shard))
        heapq.heappush(free, (now + durations[shard], worker))
    reissued = 0
    if job.reissue is not None:
        # Workers that have nothing to do any more take copies; a copy is not slow, as it is the machine that was.
        median = float(np.median(durations))
        improved = []
        for end, seconds, shard in sorted(ends, reverse=True):
            second_start = max(last_start, end - seconds + job.reissue * median)
            if end > second_start + plain:
                reissued, end = reissued + 1, second_start + plain
            improved.append((end, seconds, shard))
        ends = improved
    makespan = max(end for end, _, _ in ends)
    useful = float(durations.sum())
    spent = makespan * job.workers
    return Schedule(makespan / 3600, spent / 3600, useful / spent, (makespan - last_start) / 3600, redone, reissued)


def measure(samples: int = 4000) -> dict[str, float]:
    """Costs on this machine, one core, of shards of small JPEGs: of reading headers, reading, decoding, and tables."""
    import pyarrow as pa

    import diffprune.progress
    from diffprune.decode import read_batches
    from diffprune.engines import run_stage
    from diffprune.packing import PackedSample, write_shards
    from diffprune.shards import index_shard
    from diffprune.tables import base_table

    diffprune.progress.set_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        root, data = Path(folder), photograph()
        write_shards(
            (PackedSample(f"{i:06d}", {"jpg": data, "cls": b"7"}) for i in range(samples)),
            root,
            prefix="s",
            shard_size=samples,
        )
        path = root / "s-000000.tar"
        index_shard(path)
        index_seconds = timed(lambda: index_shard(path))
        tracemalloc.start()
        first = index_shard(path)  # Python keeps some of what it used for it
        held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes()
        index = index_shard(path)
        index_bytes = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - held
        tracemalloc.stop()
        assert index == first
        options = {"size": None, "channels": 3, "batch_size": 64, "threads": 1}
        decode_seconds = timed(lambda: [len(batch.keys) for batch in read_batches(index, **options)], 1)
        rows = base_table(path.name, index.samples, [7] * samples, [None] * samples, [None] * samples)
        stems = [f"t{i}" for i in range(20)]
        began = time.process_time()
        run_stage("score", root / "tables", {}, stems, lambda stem, bar: rows, total=1)
        table_seconds = (time.process_time() - began) / len(stems)
        table_bytes = (root / "tables" / "t0.parquet").stat().st_size / samples
    return {
        "index_us_per_image": index_seconds / samples * 1e6,
        "index_bytes_per_image": index_bytes / samples,
        "read_and_decode_us_per_image": decode_seconds / samples * 1e6,
        "table_us_per_image": table_seconds / samples * 1e6,
        "table_bytes_per_image": table_bytes,
    }


def photograph() -> bytes:
    """A JPEG of 500×375 pixels with as much in it as a photograph: about 50 kB."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def timed(work, repeats: int = 3) -> float:
    """The median of the CPU seconds that it takes: other work on the machine does not show in it."""
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return float(np.median(seconds))


def costs_table(costs: dict[str, float], images_per_second: float) -> str:
    """Time, memory and storage of three data sets."""
    lines = [
        "| images | shards | headers, core-hours | decoding, core-hours | GPU-hours of one pass | index in memory "
        "| tables | latents | embeddings |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for images, per_shard in ((1.28e6, 1000), (100e6, 10_000), (5e9, 10_000)):
        cells = [
            f"{images / 1e6:,.4g}M",
            f"{images / per_shard:,.0f}",
            f"{images * costs['index_us_per_image'] / 3.6e9:,.3g}",
            f"{images * costs['read_and_decode_us_per_image'] / 3.6e9:,.3g}",
            f"{images / images_per_second / 3600:,.3g}",
            size(images * costs["index_bytes_per_image"]),
            size(images * costs["table_bytes_per_image"]),
            size(images * 4 * 32 * 32 * 2),
            size(images * 768 * 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def schedule_table(images_per_second: float, seed: int) -> str:
    """Simulated: the three data sets over workers, with and without a second copy of stragglers."""
    lines = [
        "| images | workers | hours | at best | useful | shards redone | tail, minutes | tail with copies, minutes |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for images, per_shard, workers in (
        (1.28e6, 1000, 1),
        (1.28e6, 1000, 8),
        (1.28e6, 1000, 64),
        (100e6, 10_000, 8),
        (100e6, 10_000, 64),
        (100e6, 10_000, 512),
        (5e9, 10_000, 512),
        (5e9, 10_000, 4096),
    ):
        job = Job(int(images / per_shard), per_shard, workers, 1 / images_per_second)
        found, copies = simulate(job, seed), simulate(replace(job, reissue=3.0), seed)
        ideal = images / images_per_second / workers / 3600
        cells = [f"{images / 1e6:,.4g}M", f"{workers:,}", f"{found.hours:,.3g}", f"{ideal:,.3g}", f"{found.useful:.1%}"]
        cells += [f"{found.redone:,}", f"{found.tail_hours * 60:.1f}", f"{copies.tail_hours * 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000:
            return f"{count:,.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} EB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="only measure the costs")
    parser.add_argument("--rate", type=float, default=500.0, help="ASSUMED images a second of one worker with its GPU")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    costs = measure()
    for name, value in costs.items():
        print(f"{name:<32}{value:>10,.4g}")
    if arguments.measure:
        return
    print(f"\nASSUMED, not measured: {arguments.rate:g} images/s of a worker with a GPU\n")
    print(costs_table(costs, arguments.rate))
    print()
    print(schedule_table(arguments.rate, arguments.seed))


if __name__ == "__main__":
    main()
