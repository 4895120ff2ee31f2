"""Runs the cases of one op, in a process of its own: a kernel that breaks the device ends this process alone.

    python -m benchmarks.gpu_worker OP --records FILE [--done JSON] [--device cpu] [--quick]

Appends one JSON line to FILE before each measurement ({"started": key}) and one after it (the record).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_cases_kmeans as kmeans
from benchmarks import gpu_cases_models as models
from benchmarks import gpu_cases_scores as scores
from benchmarks.gpu_case import Case, Scale, Way, normal
from benchmarks.gpu_cases_scoring import SCORING
from benchmarks.gpu_cases_training import TRAINING
from benchmarks.gpu_timing import Clock, CudaClock, HostClock, measure, set_count

SECONDS = 0.4
"""Of timed calls for each way."""

BROKEN = 3
"""Exit status after an error that the device does not recover from in this process."""


def ceiling_cases(scale: Scale) -> Iterator[Case]:
    """What the device reaches: a large copy, and products of 8192×8192 matrices."""
    n, m = scale.size(2**30, 2**12), scale.size(8192, 32)

    def make_copy(generator: torch.Generator) -> tuple:
        source = torch.randint(256, (n,), generator=generator, device=generator.device, dtype=torch.uint8)
        return torch.empty_like(source), source

    copy = Way("copy", lambda target, source: target.copy_(source))
    yield Case("ceilings", "copy", {"bytes": n}, "uint8", make_copy, lambda: [copy], 2 * n, 0)
    for dtype in (torch.float16, torch.bfloat16):

        def make(generator: torch.Generator, dtype: torch.dtype = dtype) -> tuple:
            return normal(generator, m, m, dtype=dtype), normal(generator, m, m, dtype=dtype)

        name = str(dtype).removeprefix("torch.")
        product = Way(f"matmul_{name}", lambda a, b: a @ b)
        moved = 3 * m * m * dtype.itemsize
        yield Case("ceilings", f"matmul {name}", {"M": m, "N": m, "K": m}, name, make,
                   lambda way=product: [way], moved, 2 * m**3)  # fmt: skip


CASES: dict[str, Callable[[Scale], Iterator[Case]]] = {
    "ceilings": ceiling_cases,
    "linear_grad_dot": scores.linear_grad_dot_cases,
    "linear_grad_sqnorm": scores.linear_grad_sqnorm_cases,
    "kmeans_assign": kmeans.kmeans_assign_cases,
    "kmeans_update": kmeans.kmeans_update_cases,
    "kmeans_round": kmeans.kmeans_round_cases,
    "attention": models.attention_cases,
    "adaln_modulate": models.adaln_modulate_cases,
    "flow_matching_loss": models.flow_matching_loss_cases,
    **SCORING,
    **TRAINING,
    "linear_grad_sqnorm_dot": scores.linear_grad_sqnorm_dot_cases,
    "pairwise_topk": scores.pairwise_topk_cases,
    "gated_residual": models.gated_residual_cases,
    "flow_interpolate": models.flow_interpolate_cases,
    "kmeans_update_delta": kmeans.kmeans_update_delta_cases,
}
"""In the order in which they run: what has a goal first, as time may be up before the last."""


class DeviceBroken(Exception):
    """The device fails whatever is asked of it from now on."""


def plan(op: str, scale: Scale) -> list[dict[str, Any]]:
    """The record of each measurement of ``op`` before it is made, status "planned"."""
    return [_record(case, way, "planned") for case in CASES[op](scale) for way in case.ways()]


def run_op(
    op: str,
    scale: Scale,
    emit: Callable[[dict[str, Any]], None],
    done: Collection[str] = (),
    clock: Clock | None = None,
) -> None:
    """Measure every way of every case of ``op`` whose key is not in ``done``. Raises DeviceBroken."""
    clock = clock or (CudaClock() if scale.device.type == "cuda" else HostClock())
    for case in CASES[op](scale):
        run_case(case, scale, emit, done, clock)


def run_case(
    case: Case, scale: Scale, emit: Callable[[dict[str, Any]], None], done: Collection[str], clock: Clock
) -> None:
    """Measure the ways of one case whose key is not in ``done``. Raises DeviceBroken."""
    ways = [way for way in case.ways() if key(_record(case, way, "")) not in done]
    sets: list[tuple] = []
    for way in ways:
        record = _record(case, way, "planned")
        emit({"started": key(record)})
        try:
            sets = sets or _input_sets(case, scale)
            record |= measure_way(way, sets, clock, 0.0 if scale.quick else SECONDS)
        except NotImplementedError as error:
            record |= {"status": "refused", "reason": str(error)}
        except Exception as error:  # of a kernel, the compiler or the allocator: it goes into the results
            record |= {"status": "error", "reason": f"{type(error).__name__}: {error}"[:2000]}
        emit(record)
        if record["status"] == "error":
            _expect_working(clock)
    del sets
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()


def measure_way(way: Way, sets: list[tuple], clock: Clock, budget: float) -> dict[str, Any]:
    """Status, error and time of one way. A wrong answer, before the timing or after it, has no time."""
    if way.missing:
        return {"status": "unavailable", "reason": way.missing}
    found: dict[str, Any] = {} if way.check is None else _checked(way, sets[0])
    if found.get("status") == "wrong":
        return found
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    timing = measure(clock, way.run, sets, budget=budget, warmup=1 if budget == 0 else 3)
    if way.check is not None:
        found |= _checked(way, sets[-1])
        if found["status"] == "wrong":
            return found | {"reason": "right before the timing, wrong after it: " + found["reason"]}
    if torch.cuda.is_available():
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    times = {"median_s": timing.median, "lower_s": timing.lower, "upper_s": timing.upper}
    return {**found, "status": "ok", **times, "repeats": timing.repeats, "input_sets": len(sets)}


def key(record: dict[str, Any]) -> str:
    """What names a measurement."""
    return f"{record['op']}/{record['label']}/{record['implementation']}"


def _checked(way: Way, inputs: tuple) -> dict[str, Any]:
    _poison(inputs)
    error = way.check(inputs, way.run(*inputs))
    shown = error if isfinite(error) else "not finite, or another answer"
    if isfinite(error) and error <= way.tolerance:
        return {"status": "ok", "error": shown}
    return {"status": "wrong", "error": shown, "reason": f"error {shown}, allowed {way.tolerance:g}"}


def _poison(inputs: tuple) -> None:
    """Fill free memory with NaN, so that an output that is not written whole is not the last run's right one."""
    device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
    if device.type == "cuda":
        large = [torch.full((2**28,), torch.nan, device=device)]
        small = [torch.full((2**17,), torch.nan, device=device) for _ in range(32)]
        torch.cuda.synchronize(device)
        del large, small


def _input_sets(case: Case, scale: Scale) -> list[tuple]:
    generator = torch.Generator(scale.device).manual_seed(0)
    first = case.make(generator)
    if scale.device.type != "cuda":
        return [first, case.make(generator)]
    cache = torch.cuda.get_device_properties(scale.device).L2_cache_size
    held = sum(x.numel() * x.element_size() for x in first if isinstance(x, torch.Tensor))
    return [first, *(case.make(generator) for _ in range(set_count(held, cache) - 1))]


def _expect_working(clock: Clock) -> None:
    try:
        clock.synchronize()
    except RuntimeError as error:
        raise DeviceBroken(str(error)) from error


def _record(case: Case, way: Way, status: str) -> dict[str, Any]:
    fields = {name: getattr(case, name) for name in ("op", "label", "shape", "dtype", "bytes", "operations")}
    goals = [asdict(replace(goal)) for goal in case.goals] if way.ours else []
    for goal in goals:
        goal["against"] = list(goal["against"])
    return {**fields, "implementation": way.name, "ours": way.ours, "goals": goals, "status": status}


def main(arguments: list[str] | None = None) -> int:
    """See the module; exit status BROKEN after DeviceBroken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=CASES)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--done", default="[]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    with open(options.records, "a", buffering=1, encoding="utf-8") as file:
        try:
            scale = Scale(torch.device(options.device), options.quick)
            run_op(options.op, scale, lambda r: file.write(json.dumps(r) + "\n"), json.loads(options.done))
        except DeviceBroken as error:
            print(error, file=sys.stderr)
            return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
