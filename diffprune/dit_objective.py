"""What a DiT is trained to do: predict the velocity of latents on the linear path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffprune.arrays import sha256_rows
from diffprune.config import DitRun, TrainConfig
from diffprune.flow import interpolate, velocity_loss, velocity_target
from diffprune.kernels import flow_interpolate, flow_matching_loss
from diffprune.kernels.philox import normal_noise
from diffprune.learner import Objective
from diffprune.models.dit import DiT
from diffprune.models.ops import TORCH, choose_ops
from diffprune.ranks import Ranks
from diffprune.training_latents import StoredLatents, sha256_of_training
from diffprune.training_order import BalancedOrder


class DitObjective(Objective):
    """Latents, labels, and the flow matching loss of a DiT on them."""

    kind = "dit"
    model: DiT

    def __init__(
        self,
        run: DitRun,
        ranks: Ranks,
        device: torch.device,
        keys: Sequence[str],
        values: np.ndarray | StoredLatents,
        twins: np.ndarray | StoredLatents | None,
        labels: Tensor | None,
        source: dict[str, Any],
    ) -> None:
        self.ranks, self.device, self.train = ranks, device, run.train
        self.impl = choose_ops(run.train.ops, device)
        self.model = DiT(**asdict(run.model), seed=run.train.seed).to(device)
        self.model.use_ops(self.impl)
        self.keys = keys
        self.values, self.twins = _by_tensors(values), None if twins is None else _by_tensors(twins)
        self.labels = labels
        self.latents = source
        self.order: BalancedOrder | None = None
        more = [part for part in (None if labels is None else labels.numpy(), twins) if part is not None]
        self.data = {"samples": len(keys), "sha256": sha256_of_training(keys, values, *more, ranks=ranks)}

    def balance(self, groups: Tensor, name: str, weights: Mapping[int, int] | None) -> None:
        """See each of these groups [N] equally often, or in proportion to its weight."""
        self.order = BalancedOrder(groups, self.train.seed, weights)
        self.data["balanced_by"] = "label" if name == "label" else "cluster"
        self.data["balanced_sha256"] = sha256_rows([], groups.numpy())
        if weights is not None:
            self.data["group_weights"] = {str(group): weight for group, weight in sorted(weights.items())}

    def start(self, weights: dict[str, Tensor], sha256: str) -> None:
        """Begin with these weights."""
        self.model.load_state_dict(weights)
        self.data["start_sha256"] = sha256

    def rows(self, step: int, train: TrainConfig) -> Tensor:
        return super().rows(step, train) if self.order is None else self.order.batch(train.batch_size, step)

    def draw(self, rows: Tensor, share: slice, generator: torch.Generator) -> tuple[Tensor, ...]:
        count = len(rows)
        if self.train.timesteps == "lognormal":
            t = torch.randn(count, generator=generator).sigmoid()
        else:
            t = torch.rand(count, generator=generator)
        if self.train.noise == "counter":  # of each place in the batch: a sample may stand in it twice
            noise = torch.randint(1 << 62, (count,), generator=generator)
        else:
            noise = torch.randn((count, *self.values.shape[1:]), generator=generator)
        dropped = torch.rand(count, generator=generator) < self.model.config.class_dropout_prob
        own = rows[share]
        if self.twins is None:
            x1 = self.values[own].float()
        else:
            mirrored = torch.rand(count, generator=generator)[share] < 0.5
            x1 = torch.empty(len(own), *self.values.shape[1:])
            x1[mirrored], x1[~mirrored] = self.twins[own[mirrored]].float(), self.values[own[~mirrored]].float()
        inputs = (x1, noise[share], t[share])
        if self.labels is None:
            return inputs
        return (*inputs, torch.where(dropped, self.model.num_classes, self.labels[rows])[share])

    def losses(self, model: nn.Module, x1: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.train.noise == "counter" and self.impl is not None:
            counter = noise, self.train.seed, 0
            velocity = model(flow_interpolate(x1, t, *counter, impl=self.impl), t, labels)
            return flow_matching_loss(velocity, x1, *counter, impl=self.impl)
        x0 = noise
        if self.train.noise == "counter":
            x0 = normal_noise(noise, self.train.seed, 0, x1[0].numel()).view_as(x1).to(x1.dtype)
        velocity = model(interpolate(x1, x0, t), t, labels)
        return velocity_loss(velocity.to(x1.dtype), velocity_target(x1, x0))

    def report(self) -> dict[str, Any]:
        held = [latents for latents in (self.values, self.twins) if latents is not None]
        return {
            "ops": TORCH if self.impl is None else self.impl,
            "latents": "in files" if isinstance(self.values, StoredLatents) else "in memory",
            "latents_bytes": sum(latents.nbytes for latents in held),
        }

    def forward_of_one(self) -> None:
        config = self.model.config
        labels = torch.zeros(1, dtype=torch.int64) if config.num_classes else None
        latent = torch.zeros(1, *config.latent_shape)
        DiT(**asdict(config))(latent, torch.zeros(1), labels)


def _by_tensors(values: np.ndarray | StoredLatents) -> Tensor | StoredLatents:
    """What takes and gives rows as tensors."""
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values
