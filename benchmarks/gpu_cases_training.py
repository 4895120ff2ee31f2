"""Cases of whole training steps: DiT-XL/2, B/2 and S/2 on latents of 256-pixel images, in bfloat16.

A step is the trainer's own (forward, backward, AdamW, moving average), its inputs on the device already. The way that
ours is compared with is the same step with the blocks' own PyTorch code under ``torch.compile`` and stored noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_case import Case, Goal, Scale, Way, normal, relative_error
from diffprune.config import DitConfig, DitRun, TrainConfig
from diffprune.dit_objective import DitObjective
from diffprune.flow import interpolate, velocity_loss, velocity_target
from diffprune.kernels import report
from diffprune.kernels.philox import normal_noise
from diffprune.learner import Draw, Learner
from diffprune.models.dit import DiT
from diffprune.models.ops import OPS
from diffprune.ranks import Ranks
from diffprune.throughput import step_operations

BATCHES = {"DiT-XL/2": 96, "DiT-B/2": 256, "DiT-S/2": 512}
SIZES = {"DiT-XL/2": (1152, 28, 16), "DiT-B/2": (768, 12, 12), "DiT-S/2": (384, 12, 6)}
FASTER = Goal("1.15 times compiled PyTorch", "faster", 1.15, ("torch.compile",))
HALF = Goal("50% MFU", "matmul", 0.5)
TOLERANCE = 3e-2
"""Of loss, gradient norm and two gradients, against float32: bfloat16's rounding."""
SEED = 3

_step: dict[str, TrainingStep] = {}  # the last one that ran, alone: two sets of weights and moments may not fit


def training_cases(name: str, scale: Scale) -> Iterator[Case]:
    """One model's step."""
    config = dit_config(name, scale.quick)
    batch = scale.size(BATCHES[name], 3)
    operations, parameters = step_counts(config)

    def make(generator: torch.Generator) -> tuple:
        shape = (config.in_channels, config.input_size, config.input_size)
        device = generator.device
        x1 = normal(generator, batch, *shape, dtype=torch.float32)
        hashes = torch.randint(2**62, (batch,), generator=generator, device=device)
        x0 = normal_noise(hashes, SEED, 0, x1[0].numel()).view_as(x1)
        t = torch.rand(batch, generator=generator, device=device)
        return x1, x0, hashes, t, torch.randint(config.num_classes, (batch,), generator=generator, device=device)

    def run(form: str, *inputs: Tensor) -> tuple:
        if form not in _step:
            _step.clear()
            _step[form] = TrainingStep(config, form, scale, batch)
        return _step[form](*inputs)

    def ways() -> list[Way]:
        form = "triton" if scale.device.type == "cuda" else "reference"
        missing = next((f"{op}: {reason}" for op in OPS if (reason := report()[op].get(form, "there is none"))), None)
        checked = partial(check, config)
        ours = Way(form, partial(run, form), True, checked, TOLERANCE, missing)
        return [Way("torch.compile", partial(run, "torch"), False, checked, TOLERANCE), ours]

    # Per weight in float32: itself, both moments and the average read and written, its gradient written and read.
    moved = parameters * 4 * (2 * 4 + 2)
    goals = (FASTER, HALF) if name == "DiT-XL/2" else (FASTER,)
    shape = {"images": batch, "T": (config.input_size // config.patch_size) ** 2, "D": config.hidden_size}
    label = f"{name}, step"
    op = training_op(name)
    yield Case(op, label, shape, "bfloat16", make, ways, moved, batch * operations, goals)


def training_op(name: str) -> str:
    """What the command line calls a model's case: train_dit_xl2."""
    return "train_" + name.lower().replace("-", "_").replace("/", "")


TRAINING: dict[str, Callable[[Scale], Iterator[Case]]] = {
    training_op(name): partial(training_cases, name) for name in BATCHES
}


class TrainingStep:
    """A model, its optimizer and one of the two forms. Its learning rate is so small that the weights stay."""

    def __init__(self, config: DitConfig, form: str, scale: Scale, batch: int) -> None:
        noise = "generator" if form == "torch" else "counter"
        compiled = scale.device.type == "cuda"  # on a CPU compilation takes minutes
        train = TrainConfig(
            steps=1, batch_size=batch, lr=1e-30, grad_clip=0.0, seed=SEED, ops=form, noise=noise, compile=compiled,
            explosion_factor=0.0,
        )  # fmt: skip
        values = np.zeros((1, config.in_channels, config.input_size, config.input_size), np.float16)
        labels = torch.zeros(1, dtype=torch.int64)
        run = DitRun(config, train)
        objective = DitObjective(run, Ranks(), scale.device, ["one"], values, None, labels, {})
        objective.model.load_state_dict(lively(config, scale.device).state_dict())
        self.form, self.batch = form, batch
        self.learner = Learner(objective, train, bfloat16=True)

    def __call__(self, x1: Tensor, x0: Tensor, hashes: Tensor, t: Tensor, labels: Tensor) -> tuple:
        """The loss, the gradient's norm, and two parameters' gradients."""
        noise = x0 if self.form == "torch" else hashes
        rows = torch.zeros(self.batch, dtype=torch.int64)
        loss, norm = self.learner.step(Draw(0, rows, (x1, noise, t, labels), torch.Generator()))
        return loss, norm, *some_gradients(self.learner.model)


def check(config: DitConfig, inputs: tuple, output: tuple) -> float:
    """The largest relative error against the plain model in float32, a few rows at a time."""
    x1, x0, _, t, labels = inputs
    model = lively(config, x1.device)
    loss = 0.0
    for rows in torch.arange(len(x1), device=x1.device).split(16):
        velocity = model(interpolate(x1[rows], x0[rows], t[rows]), t[rows], labels[rows])
        part = velocity_loss(velocity, velocity_target(x1[rows], x0[rows])).sum() / len(x1)
        part.backward()
        loss += part.item()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    errors = [abs(output[0] - loss) / loss, abs(output[1] - norm) / norm]
    errors += [relative_error(o, e) for o, e in zip(output[2:], some_gradients(model), strict=True)]
    return max(errors) if all(map(isfinite, errors)) else inf


def some_gradients(model: DiT) -> list[Tensor]:
    """Of the first block's attention, behind all others, and of a block's modulation."""
    return [model.blocks[0].attn.qkv.weight.grad, model.blocks[-1].adaLN_modulation[1].weight.grad]


def lively(config: DitConfig, device: torch.device) -> DiT:
    """Initial weights and noise: a new DiT's blocks are the identity, and hide wrong gradients."""
    model = DiT(**asdict(config), seed=SEED).to(device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, device=device)
    return model


def dit_config(name: str, quick: bool) -> DitConfig:
    """The published model, or with ``quick`` a tiny one."""
    hidden, depth, heads = (24, 2, 2) if quick else SIZES[name]
    size, classes = (4, 5) if quick else (32, 1000)
    common: dict[str, Any] = {"in_channels": 4, "learn_sigma": True, "time_scale": 1.0, "label_init_std": 0.02}
    return DitConfig(
        input_size=size, patch_size=2, hidden_size=hidden, depth=depth, num_heads=heads, num_classes=classes, **common
    )


@lru_cache
def step_counts(config: DitConfig) -> tuple[int, int]:
    """Operations of a step of one image, and trainable parameters."""
    with torch.device("meta"):
        model = DiT(**asdict(config))

    def forward() -> Tensor:
        latent = torch.zeros(1, config.in_channels, config.input_size, config.input_size)
        return model(latent, torch.zeros(1), torch.zeros(1, dtype=torch.int64))

    return step_operations(forward), sum(p.numel() for p in model.parameters() if p.requires_grad)
