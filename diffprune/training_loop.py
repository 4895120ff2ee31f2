"""How a training run goes: steps, log, checkpoints, resume.

All randomness of a step is a function of (seed, step), so a resumed run needs no generator's state: it does what the
run would have done that was never stopped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, nullcontext
from typing import Any

import torch

from diffprune.checkpoints import checkpoint_path, find_checkpoints, read_state, save_checkpoint
from diffprune.config import Run, TrainConfig, from_dict, to_dict
from diffprune.engines import sweep
from diffprune.errors import InputError, ResumeError
from diffprune.files import write_json
from diffprune.learner import Draw, Learner, Objective, Stopped, learning_rate
from diffprune.locks import folder_lock
from diffprune.prefetch import Prefetch
from diffprune.progress import progress
from diffprune.run_pictures import LOSS_PLOT, SAMPLES, SampleGrids, write_loss_plot
from diffprune.storage import AnyPath, as_path, local_path
from diffprune.throughput import matmul_rate, step_operations
from diffprune.training_log import LOG_FILE, MeanLoss, Pace, TrainingLog, summary_writer

STOPPED_FILE = "stopped.json"
# What a resumed run may change: how it runs (which may round otherwise), not what it computes.
_FREE = {"train.steps", "train.checkpoint_every", "train.log_every", "train.device", "train.explosion_factor"}
_FREE |= {"train.accumulate", "train.activation_checkpointing", "train.compile", "train.ops", "train.sharding"}
_FREE |= {"train.sample_every", "train.tensorboard"}
_FREE |= {"loss.lpips_linear", "loss.lpips_vgg16"}  # where files lie; what is in them is part of the data


def run_training(
    objective: Objective,
    run: Run,
    out: str | os.PathLike,
    *,
    resume: bool,
    dry_run: bool,
    grids: SampleGrids | None = None,
) -> dict[str, Any]:
    """Train to ``run.train.steps`` steps, from the last checkpoint in ``out`` if there is one. See ``train_vqvae``.

    ``grids`` are drawn every ``run.train.sample_every`` steps and at the end.
    """
    out = as_path(out)
    if run.train.tensorboard:
        local_path(out, "a run folder with TensorBoard's files")
    # One run at a time: the first process holds the folder for all.
    with nullcontext() if dry_run or objective.ranks.rank else folder_lock(out):
        return _train(objective, run, out, resume, dry_run, grids)


def _train(
    objective: Objective, run: Run, out: AnyPath, resume: bool, dry_run: bool, grids: SampleGrids | None
) -> dict[str, Any]:
    train, ranks = run.train, objective.ranks
    if train.tensorboard:
        summary_writer()  # told before the work, and by every process
    checkpoint, state = _last_checkpoint(objective, run, out, resume)
    first_step = state["step"] if state else 0
    # Nobody writes before everyone has looked.
    if len(steps := set(ranks.gathered_objects(first_step))) > 1:
        raise ResumeError(f"{out}: its processes saw different last checkpoints: of steps {sorted(steps)}; run again")
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
        **objective.report(),
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
    log = TrainingLog(out if ranks.rank == 0 else None, first_step, train.tensorboard)
    if ranks.rank == 0:
        (out / STOPPED_FILE).unlink(missing_ok=True)
        for folder in (out, out / SAMPLES):
            sweep(folder)
    if state:
        _draw_what_is_missing(learner, train, out, first_step, grids)
    peak = matmul_rate(objective.device, torch.bfloat16 if bfloat16 else torch.float32) * ranks.size
    mean = MeanLoss(train.log_every, state and state.get("logged_loss"))
    loss, title = None, f"train {objective.kind}"

    def draws(_: str) -> Iterator[Draw]:
        return map(learner.draw, range(first_step, train.steps))

    with (
        closing(log),
        Prefetch(draws, [title]) as batches,
        progress(title, total=(train.steps - first_step) * train.batch_size, unit="images") as bar,
    ):
        pace = Pace(bar if ranks.rank == 0 else None, train.batch_size, train.steps, first_step, operations / peak)
        for draw in batches.parts(title):
            try:
                loss, grad_norm = learner.step(draw)
            except Stopped as stopped:
                log.keep()
                if ranks.rank == 0:
                    last = None if checkpoint is None else str(checkpoint)
                    write_json(out / STOPPED_FILE, {**stopped.details, "last_checkpoint": last})
                raise
            done = draw.step + 1
            pace.step(loss, grad_norm)
            mean.add(done, loss)
            if done % train.log_every == 0 or done == train.steps:
                log.write(done, pace, loss=mean.value, grad_norm=grad_norm, **objective.metrics())
            if done % train.checkpoint_every == 0 or done == train.steps:
                log.keep()
                checkpoint = _save(learner, run, out, done, mean)
                if ranks.rank == 0 and log.last:
                    write_loss_plot(out / LOG_FILE, out / LOSS_PLOT)
            if grids is not None and (done % train.sample_every == 0 or done == train.steps):
                weights = learner.averages()
                if ranks.rank == 0:
                    grids.write(weights, out / SAMPLES / f"{checkpoint_path(out, done).name}.png")
    ranks.wait()  # no process returns before the first one has written the last checkpoint
    summary = objective.summary() if first_step < train.steps and ranks.rank == 0 else {}
    return {**report, "checkpoint": str(checkpoint), "loss": loss, **log.last, **summary, **pace.whole()}


def _draw_what_is_missing(
    learner: Learner, train: TrainConfig, out: AnyPath, step: int, grids: SampleGrids | None
) -> None:
    """The pictures that belong to the checkpoint gone on from: a kill may have come between it and them."""
    is_first = learner.objective.ranks.rank == 0
    if is_first and (out / LOG_FILE).is_file() and (out / LOG_FILE).stat().st_size:
        write_loss_plot(out / LOG_FILE, out / LOSS_PLOT)
    if grids is not None and (step % train.sample_every == 0 or step == train.steps):
        weights, path = learner.averages(), out / SAMPLES / f"{checkpoint_path(out, step).name}.png"
        if is_first and not path.is_file():
            grids.write(weights, path)


def _save(learner: Learner, run: Run, out: AnyPath, step: int, mean: MeanLoss) -> AnyPath:
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
        "logged_loss": mean.state,
    }
    return save_checkpoint(out, state, tensors)


def _last_checkpoint(
    objective: Objective, run: Run, out: AnyPath, resume: bool
) -> tuple[AnyPath | None, dict[str, Any] | None]:
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


def _use_bfloat16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"
