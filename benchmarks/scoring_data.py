"""A latents folder and a surrogate, made up, as `encode` and `train dit` leave them: for benchmarks of `score`."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from diffprune.arrays import write_array
from diffprune.checkpoints import save_checkpoint
from diffprune.config import DitRun
from diffprune.draws import draw_pair
from diffprune.engines import run_stage
from diffprune.flow import interpolate, velocity_loss, velocity_target
from diffprune.models.dit import DiT
from diffprune.shards import Member, Sample
from diffprune.tables import base_table

SHA = "0" * 64


def write_latents(folder: Path, latents: Tensor, labels: Tensor, shard_size: int) -> Path:
    """Latents [N, C, H, W], labels [N], under keys "00000000", ...."""
    starts = range(0, len(latents), shard_size)
    parts = {f"shard-{i:06d}": range(start, min(start + shard_size, len(latents))) for i, start in enumerate(starts)}

    def work(stem, bar):
        rows = parts[stem]
        write_array(folder / f"{stem}.npy", latents[rows.start : rows.stop].numpy())
        keys = [f"{row:08d}" for row in rows]
        entries = [Sample(key, i, (Member(key, "png", 1024 * i, 1024 * i, 512),)) for i, key in enumerate(keys)]
        given = labels[rows.start : rows.stop].tolist()
        bar.advance(len(rows))
        return base_table(f"{stem}.tar", entries, given, [None] * len(rows), [None] * len(rows))

    config = {"kind": "latents", "shape": list(latents.shape[1:]), "model_sha256": SHA, "latent_scale": 1.0}
    run_stage("encode", folder, config, list(parts), work, total=len(latents))
    return folder


def write_surrogate(run: Path, models: dict[int, DiT]) -> Path:
    """Checkpoints by step."""
    for step, model in models.items():
        state = {"kind": "dit", "step": step, "total_steps": max(models), "lr": 1e-3, "images_seen": step, "seed": 0}
        state |= {"config": asdict(DitRun(model=model.config)), "data": {}, "latents": {"model_sha256": SHA}}
        save_checkpoint(run, state, {"model": model.state_dict()})
    return run


def with_all_weights(model: DiT, std: float = 0.02) -> DiT:
    """No zero weight: adaLN-Zero's would hide most parameters from the gradient."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return model.eval()


def trained(model: DiT, latents: Tensor, labels: Tensor, steps: tuple[int, ...]) -> dict[int, DiT]:
    """The model after so many steps of AdamW on random batches of 64: step -> a copy."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0)
    copies = {}
    for step in range(1, max(steps) + 1):
        rows = torch.randint(0, len(latents), (64,), generator=torch.Generator().manual_seed(step))
        x1 = latents[rows]
        t, x0 = draw_pair(1, [f"{step}/{i}" for i in range(64)], 0, 1, x1.shape[1:])
        optimizer.zero_grad()
        velocity_loss(model(interpolate(x1, x0, t), t, labels[rows]), velocity_target(x1, x0)).mean().backward()
        optimizer.step()
        if step in steps:
            copies[step] = copy.deepcopy(model).eval()
    return copies
