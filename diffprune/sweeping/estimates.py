"""How long a cell takes: from a training step and a step of sampling that are measured, not assumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from diffprune.config import DitRun
from diffprune.dit_objective import DitObjective
from diffprune.flow import guided_velocity
from diffprune.generation import in_precision
from diffprune.learner import Learner
from diffprune.models.dit import DiT
from diffprune.ranks import training_ranks
from diffprune.sweeping.settings import SweepConfig, with_device

ENOUGH_SECONDS = 0.5
REPEATS = 5
_EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2}


def estimate(config: SweepConfig, cells: int, jobs: int, device: str) -> dict[str, Any]:
    """Hours of training and sampling per cell on this device, and of ``cells`` cells with ``jobs`` at a time.

    A training step (drawing, forward, backward, AdamW, moving average) of the config's DiT and a step of its sampling
    are timed on random latents, at the config's batch size or, where that would take long, at the largest power of two
    that takes under half a second, and taken in proportion: on a GPU that overstates. Not in it: the shared stages,
    selection, decoding, features and metrics. With several jobs a device is shared, which only GPUs of their own
    make up for.

    Returns ``measured`` (device, threads, training and sampling: batch and seconds per step), ``hours_per_cell``,
    ``hours_training``, ``hours_sampling``, ``cells_to_run`` and ``hours_in_all``.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(config.sweep.threads)
    try:
        train, sample = config.dit.train, config.sample
        training = _scaled(lambda batch: _training_step(config.dit, batch, device), train.batch_size)
        batch = min(sample.batch_size, sample.count)
        sampling = _scaled(lambda size: _sampling_step(config, size, device), batch)
    finally:
        torch.set_num_threads(before)
    evaluations = sample.steps * _EVALUATIONS[sample.method]
    hours_training = train.steps * training["seconds"] / 3600
    hours_sampling = sample.count / batch * evaluations * sampling["seconds"] / 3600
    hours = hours_training + hours_sampling
    chosen = training_ranks(device, 1)[1]
    return {
        "measured": {
            "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else str(chosen),
            "threads": config.sweep.threads,
            "training": {**training, "steps": train.steps},
            "sampling": {**sampling, "evaluations": evaluations, "images": sample.count},
        },
        "hours_per_cell": hours,
        "hours_training": hours_training,
        "hours_sampling": hours_sampling,
        "cells_to_run": cells,
        "hours_in_all": hours * -(-cells // jobs),
        "not_included": "the shared stages, selection, decoding, features and metrics",
    }


def _scaled(prepare: Callable[[int], Callable[[], None]], wanted: int) -> dict[str, Any]:
    """Seconds of a step of ``wanted`` rows, from the largest batch that is quick enough."""
    batch = 1
    while True:
        step = prepare(batch)
        step()  # allocation, compiling
        seconds = _timed(step)
        if batch == wanted or seconds > ENOUGH_SECONDS:
            break
        batch = min(2 * batch, wanted)
    if seconds <= ENOUGH_SECONDS:
        seconds = sorted([seconds, *(_timed(step) for _ in range(REPEATS - 1))])[REPEATS // 2]
    return {"batch": wanted, "measured_batch": batch, "seconds": seconds * wanted / batch}


def _timed(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _training_step(run: DitRun, batch: int, device: str) -> Callable[[], None]:
    run = with_device(run, device, batch_size=batch, accumulate=1)
    model, ranks = run.model, training_ranks(device, batch)
    shape = (batch, *model.latent_shape)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    labels = torch.zeros(batch, dtype=torch.int64) if model.num_classes else None
    keys = [str(row) for row in range(batch)]
    twins = values if run.train.flip else None
    objective = DitObjective(run, *ranks, keys, values, twins, labels, {})
    bfloat16 = run.train.precision == "bfloat16" or (run.train.precision == "auto" and ranks[1].type == "cuda")
    learner = Learner(objective, run.train, bfloat16)
    number = iter(range(1 << 30))

    def step() -> None:
        learner.step(learner.draw(next(number)))

    return step


def _sampling_step(config: SweepConfig, batch: int, device: str) -> Callable[[], None]:
    run, chosen = config.dit, training_ranks(device, 1)[1]
    model = DiT(**asdict(run.model)).to(chosen).eval()
    evaluated = in_precision(model, config.sample.precision)
    size = run.model.input_size
    x = torch.zeros(batch, run.model.in_channels, size, size, device=chosen)
    t = torch.full((batch,), 0.5, device=chosen)
    labels = torch.zeros(batch, dtype=torch.int64, device=chosen) if run.model.num_classes else None

    def step() -> None:
        with torch.inference_mode():
            guided_velocity(evaluated, x, t, labels, config.sample.guidance, model.null_label)

    return step
