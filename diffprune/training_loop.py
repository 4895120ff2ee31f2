"""How a training run goes: steps, log, checkpoints, resume.

All randomness of a step is a function of (seed, step), so a resumed run needs no generator's state: it does what the
run would have done that was never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffprune.checkpoints import checkpoint_path, find_checkpoints, read_state, save_checkpoint
from diffprune.config import Run, from_dict, to_dict
from diffprune.errors import InputError, ResumeError
from diffprune.files import atomic_path, write_json
from diffprune.learner import Draw, Learner, Objective, Stopped, learning_rate
from diffprune.prefetch import Prefetch
from diffprune.progress import Progress, progress
from diffprune.storage import local_path
from diffprune.throughput import duration, matmul_rate, step_operations

LOG_FILE = "log.jsonl"
STOPPED_FILE = "stopped.json"
# What a resumed run may change: how it runs (which may round otherwise), not what it computes.
_FREE = {"train.steps", "train.checkpoint_every", "train.log_every", "train.device", "train.explosion_factor"}
_FREE |= {"train.accumulate", "train.activation_checkpointing", "train.compile"}
_FREE |= {"loss.lpips_linear", "loss.lpips_vgg16"}  # where files lie; what is in them is part of the data


def run_training(objective: Objective, run: Run, out: str | Path, *, resume: bool, dry_run: bool) -> dict[str, Any]:
    """Train to ``run.train.steps`` steps, from the last checkpoint in ``out`` if there is one. See ``train_vqvae``."""
    out, train, ranks = local_path(out, "a run folder"), run.train, objective.ranks
    checkpoint, state = _last_checkpoint(objective, run, out, resume)
    ranks.wait()  # nobody writes before everyone has looked
    first_step = state["step"] if state else 0
    bfloat16 = _use_bfloat16(train.precision, objective.device)
    operations = step_operations(objective.forward_of_one)
    report = {
        "kind": objective.kind,
        "out": str(out),
        "images": len(objective.keys),
        "parameters": sum(p.numel() for p in objective.model.parameters()),
        "device": str(objective.device),
        "processes": ranks.size,
        "precision": "bfloat16" if bfloat16 else "float32",
        "operations_per_image": operations,
        "steps": train.steps,
        "first_step": first_step,
        "images_seen": train.steps * train.batch_size,
        "epochs": train.steps * train.batch_size / len(objective.keys),
    }
    if dry_run:
        return {**report, "dry_run": True}
    learner = Learner(objective, train, bfloat16)
    if state:
        learner.restore(checkpoint, state)
    log = _Log(out / LOG_FILE if ranks.rank == 0 else None, first_step)
    if ranks.rank == 0:
        (out / STOPPED_FILE).unlink(missing_ok=True)
    peak = matmul_rate(objective.device, torch.bfloat16 if bfloat16 else torch.float32) * ranks.size
    loss, title = None, f"train {objective.kind}"

    def draws(_: str) -> Iterator[Draw]:
        return map(learner.draw, range(first_step, train.steps))

    with (
        Prefetch(draws, [title]) as batches,
        progress(title, total=(train.steps - first_step) * train.batch_size, unit="images") as bar,
    ):
        pace = _Pace(bar if ranks.rank == 0 else None, train.batch_size, train.steps, first_step, operations / peak)
        for draw in batches.parts(title):
            try:
                loss, grad_norm = learner.step(draw)
            except Stopped as stopped:
                if ranks.rank == 0:
                    last = None if checkpoint is None else str(checkpoint)
                    write_json(out / STOPPED_FILE, {**stopped.details, "last_checkpoint": last})
                raise
            done = draw.step + 1
            pace.step(loss, grad_norm)
            if done % train.log_every == 0 or done == train.steps:
                log.write(done, pace, loss=loss, grad_norm=grad_norm, **objective.metrics())
            if done % train.checkpoint_every == 0 or done == train.steps:
                checkpoint = _save(learner, run, out, done)
    summary = objective.summary() if first_step < train.steps and ranks.rank == 0 else {}
    return {**report, "checkpoint": str(checkpoint), "loss": loss, **log.last, **summary, **pace.whole()}


class _Pace:
    """Images per second, MFU and the time left: shown at each step, logged now and then."""

    def __init__(
        self, bar: Progress | None, batch_size: int, steps: int, first_step: int, image_seconds: float
    ) -> None:
        self.bar, self.batch_size, self.steps, self.done = bar, batch_size, steps, first_step
        # An image's operations over the matrix product rate: its seconds at an MFU of 1.
        self.image_seconds = image_seconds
        self.first = self.last_done = first_step
        self.start = self.last = time.monotonic()
        self.shown = 0.0

    def step(self, loss: float, grad_norm: float) -> None:
        self.done += 1
        if self.bar is not None:
            self.shown = self._rate(self.first, self.start)
            left = duration((self.steps - self.done) * self.batch_size / self.shown)
            self.bar.advance(
                self.batch_size,
                note=f"step {self.done:,} of {self.steps:,}  loss {loss:.4f}  gradient {grad_norm:.3g}  "
                f"MFU {self._mfu(self.shown)}  {left} left",
            )

    def since_last(self) -> dict[str, float]:
        """Since this was last asked for."""
        rate = self._rate(self.last_done, self.last)
        self.last_done, self.last = self.done, time.monotonic()
        return {"images_per_second": round(rate, 1), "mfu": round(rate * self.image_seconds, 4)}

    def whole(self) -> dict[str, float]:
        """Of the whole run; nothing where no step was done. Checkpoints and compiling are in it."""
        if self.done == self.first:
            return {}
        rate = self._rate(self.first, self.start)
        return {"images_per_second": round(rate, 1), "mfu": round(rate * self.image_seconds, 4)}

    def _rate(self, done: int, since: float) -> float:
        return (self.done - done) * self.batch_size / max(time.monotonic() - since, 1e-9)

    def _mfu(self, rate: float) -> str:
        return f"{100 * rate * self.image_seconds:.0f}%"


class _Log:
    """``log.jsonl``: a line per ``log_every`` steps; those of steps after the checkpoint resumed from are dropped.

    ``path`` is None on all ranks but the first, which writes for all.
    """

    def __init__(self, path: Path | None, first_step: int) -> None:
        self.path, self.last = path, {}
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _logged_step(line) <= first_step))

    def write(self, step: int, pace: _Pace, **numbers: float) -> None:
        self.last = numbers
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **numbers, **pace.since_last()}) + "\n")


def _save(learner: Learner, run: Run, out: Path, step: int) -> Path:
    objective, train = learner.objective, run.train
    tensors = learner.tensors()
    if objective.ranks.rank:
        return checkpoint_path(out, step)
    objective.before_checkpoint()
    state = {
        "kind": objective.kind,
        "step": step,
        "total_steps": train.steps,
        "lr": learning_rate(train, step - 1),
        "images_seen": step * train.batch_size,
        "seed": train.seed,
        "config": to_dict(run),
        "data": objective.data,
        "latents": objective.latents,
    }
    return save_checkpoint(out, state, tensors)


def _last_checkpoint(
    objective: Objective, run: Run, out: Path, resume: bool
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to go on from and its state; ResumeError if it is not one of this run."""
    found = find_checkpoints(out)
    if not found:
        return None, None
    checkpoint = found[-1]
    if not resume:
        raise InputError(f"{out}: holds checkpoints already, {checkpoint.name} the last; train into another folder")
    state = read_state(checkpoint)
    was = to_dict(from_dict(state["kind"], state["config"], str(checkpoint)))
    theirs = {"kind": state["kind"], **_flat(was), **_flat({"data": state["data"]})}
    ours = {"kind": objective.kind, **_flat(to_dict(run)), **_flat({"data": objective.data})}
    theirs |= _flat({"latents": state.get("latents") or {}})
    ours |= _flat({"latents": objective.latents or {}})
    different = [n for n in sorted({*ours, *theirs} - _FREE) if ours.get(n) != theirs.get(n)]
    if different:
        told = "; ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} now" for name in different)
        raise ResumeError(f"{checkpoint}: of another run ({told}); go on with the same, or train into another folder")
    if state["step"] > run.train.steps:
        raise ResumeError(
            f"{checkpoint}: is at step {state['step']} already, train.steps is {run.train.steps}; "
            "ask for more steps, or train into another folder"
        )
    return checkpoint, state


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def _logged_step(line: str) -> float:
    """The step of a line of the log; infinity for one that was cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _use_bfloat16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"
