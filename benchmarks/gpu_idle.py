"""How long the GPU has nothing to do while `score` goes from latents to tables: ``python -m benchmarks.gpu_idle``.

Prints JSON. From the first batch of a run, after one that compiles what there is to compile, to its last table: the
profiler's kernels and copies, joined where they overlap, against the host's clock. The profiler itself slows the host,
so that what is found is too much, if anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_cases_training import dit_config, lively

SHARDS, SHARD_SIZE = 4, 1281
"""As ImageNet has them; fewer of them."""
BATCH = 256


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-B/2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few images")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.model, torch.device(options.device), options.quick)))
    return 0


def measure(model: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """The model, images, seconds, seconds in which the device was busy, and the share in which it was not."""
    from benchmarks.scoring_data import write_latents, write_surrogate  # these want pyarrow
    from diffprune import passes
    from diffprune.scoring import score

    size = 5 if quick else SHARD_SIZE
    config = dit_config(model, quick)
    generator = torch.Generator().manual_seed(0)
    shape = (config.in_channels, config.input_size, config.input_size)
    latents = torch.randn(SHARDS * size, *shape, generator=generator)
    labels = torch.randint(config.num_classes, (len(latents),), generator=generator)
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    profiler, began, visit = profile(activities=activities), [], passes.visit

    def first_visit(*given: Any, **options: Any) -> Any:
        if not began:
            _wait(device)
            profiler.start()
            began.append(time.perf_counter())
        return visit(*given, **options)

    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder, "latents"), latents, labels, size)
        write_surrogate(Path(folder, "run"), {100: lively(config, torch.device("cpu"))})

        def run(out: str) -> None:
            score(
                Path(folder, "latents"), Path(folder, "run"), Path(folder, out), methods=("loss", "el2n", "grand"),
                precision="bf16", batch_size=8 if quick else BATCH, device=device.type,
            )  # fmt: skip
            _wait(device)

        run("first")
        with mock.patch.object(passes, "visit", first_visit):
            run("second")
        took = time.perf_counter() - began[0]
        profiler.stop()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    busy = covered(spans) / 1e6  # from µs
    idle = round(1 - busy / took, 4) if spans else None
    return {"model": model, "images": len(latents), "seconds": took, "busy_seconds": busy, "idle_share": idle}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
