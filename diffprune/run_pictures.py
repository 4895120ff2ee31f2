"""Pictures that a training run leaves in its folder: the loss so far, and grids of images that the model draws."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from diffprune.checkpoints import load_vqvae
from diffprune.config import DitConfig
from diffprune.files import atomic_path
from diffprune.generation import Sampler, Solver
from diffprune.models.dit import DiT
from diffprune.sampling import grid_columns, write_grid
from diffprune.storage import AnyPath

LOSS_PLOT = "loss.png"
SAMPLES = "samples"
ROWS = 4
"""Of a grid with a column per class; else it has 6 rows and columns."""
CURVE_POINTS = 80


def write_loss_plot(log: AnyPath, out: AnyPath) -> None:
    """Loss and gradient norm over the steps of a log.jsonl, as a PNG; equal logs give equal bytes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 5), dpi=100)
    figure.subplots_adjust(left=0.09, right=0.98, top=0.97, bottom=0.11, hspace=0.08)
    for axes, name in zip(figure.subplots(2, 1, sharex=True, height_ratios=(3, 1)), ("loss", "grad_norm"), strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
        axes.plot(steps, values, color="#9ecae1", linewidth=0.8, marker="." if len(points) < 30 else "")
        if len(points) > CURVE_POINTS:  # stretches of the run, averaged
            parts = [p.tensor_split(CURVE_POINTS) for p in (steps, values)]
            axes.plot(*([part.mean() for part in column] for column in parts), color="#08519c", linewidth=1.6)
        if values.min() > 0 and values.max() > 8 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel(name.replace("grad_norm", "gradient norm"))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("training step")
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


class SampleGrids:
    """Draws the images of `diffprune sample --grid` (50 Euler steps, no guidance) with the weights of a moment.

    Args:
        config: the DiT's.
        latents: what identifies the latents that it is trained on.
        vqvae: a checkpoint or run folder; the one that made the latents.
        seed: of the noise, which is the same in all grids.

    Raises: InputError where the VQ-VAE is another.
    """

    def __init__(
        self, config: DitConfig, latents: Mapping[str, Any], vqvae: str | os.PathLike, device: torch.device, seed: int
    ) -> None:
        with torch.device("meta"):
            dit = DiT(**asdict(config)).eval()
        state = {"path": "the DiT to train", "latents": latents, "sha256": None}
        self.sampler = Sampler((dit, state), load_vqvae(vqvae, device), None, None, device)
        self.sampler.set_up(Solver.checked("euler", None, None, None), 1.0, None, "uniform", seed)
        self.count = config.num_classes * ROWS if 0 < config.num_classes <= 20 else 36

    def write(self, weights: Mapping[str, Tensor], path: AnyPath) -> None:
        """Write a PNG atomically: a column per class, where there are 20 at most."""
        dit = self.sampler.dit
        dit.load_state_dict({name: tensor.to(self.sampler.device) for name, tensor in weights.items()}, assign=True)
        write_grid(path, self.sampler.generate(range(self.count)), grid_columns(self.count, dit.num_classes))
