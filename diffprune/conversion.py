"""``convert``: published weights -> a checkpoint that scores come from, with no training."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from diffprune.arrays import ArrayFolder, what_made
from diffprune.checkpoints import checkpoint_path, find_checkpoints, read_foreign_dit, read_state, save_checkpoint
from diffprune.config import DitRun, to_dict
from diffprune.errors import InputError, ResumeError
from diffprune.scores.batches import PREDICTS
from diffprune.storage import as_path

PUBLISHED_STEPS = 7_000_000  # of the XL/2 DiTs and SiTs for ImageNet at 256 pixels
PUBLISHED_RATE = 1e-4


def convert(
    weights: str | os.PathLike,
    latents: str | os.PathLike,
    out: str | os.PathLike,
    *,
    config: DitRun,
    predicts: str,
    steps: int = PUBLISHED_STEPS,
    learning_rate: float = PUBLISHED_RATE,
) -> dict[str, Any]:
    """Make a checkpoint of another program's DiT, for ``score``, ``sample`` and the surrogate of a ``sweep``.

    Args:
        weights: a published DiT's or SiT's state dict, or diffusers' folder: see ``checkpoints.load_foreign_dit``.
        latents: a folder of ``encode``, made by the autoencoder that the model was trained with: nothing in the
            weights says which that was.
        out: the run folder; the checkpoint is ``step_<steps>`` in it.
        config: the model that the weights fit, as for ``train_dit``. Heads, ``time_scale`` and ``rope`` show in no
            tensor: they have to be the published ones. Of its training the batch size alone is told.
        predicts: "velocity" on this package's path, as SiTs do, or "noise" of a 1000-step diffusion, as DiTs do
            (``diffprune.gaussian_diffusion``). Their tensors look alike, so it has to be said.
        steps, learning_rate: of the training that made the weights. MoSo is in proportion to both.

    Returns: kind, predicts, parameters, checkpoint, weights_sha256 (of the file that they came from).

    Raises: InputError for weights or latents that do not fit ``config``, or a bad argument; ResumeError where ``out``
    has other checkpoints; DiskFullError.
    """
    if predicts not in PREDICTS:
        raise InputError(f"predicts: expected one of {', '.join(PREDICTS)}, got {predicts!r}")
    if steps < 1:
        raise InputError(f"steps: expected 1 or more, got {steps}")
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate: expected a positive number, got {learning_rate}")
    model = config.model
    if predicts == "noise" and model.time_scale != 1:
        raise InputError(
            f"model.time_scale: expected 1, as a model of noise is given the number of a step, got {model.time_scale}"
        )
    source = what_made(ArrayFolder(latents, kind="latents"), model.latent_shape)
    dit, sha256 = read_foreign_dit(weights, model)
    state = {
        "kind": "dit",
        "step": steps,
        "total_steps": steps,
        "lr": float(learning_rate),
        "images_seen": steps * config.train.batch_size,
        "seed": config.train.seed,
        "config": to_dict(config),
        "data": {"converted_from": _name(weights), "sha256": sha256},
        "latents": source,
        "predicts": predicts,
    }
    folder = as_path(out)
    there = find_checkpoints(folder)
    if there and not (there == [checkpoint_path(folder, steps)] and state.items() <= read_state(there[0]).items()):
        raise ResumeError(f"{folder}: has another checkpoint, {there[-1].name}; give another --out")
    path = there[0] if there else save_checkpoint(folder, state, {"model": dit.state_dict()})
    parameters = sum(parameter.numel() for parameter in dit.parameters())
    report = {"kind": "dit", "predicts": predicts, "parameters": parameters, "checkpoint": str(path)}
    return {**report, "weights_sha256": sha256}


def _name(path: str | os.PathLike) -> str:
    """Without folders, and of a URL without what may be a signature."""
    path = as_path(path)
    return (path.resolve() if isinstance(path, Path) else path).name
