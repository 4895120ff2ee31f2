"""A DiT, perhaps a smaller one that begins, the VQ-VAE of their latents, and a solver: indices -> images."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffprune.checkpoints import load_dit, load_vqvae
from diffprune.config import DitConfig
from diffprune.draws import draw_noise
from diffprune.errors import DiffpruneError, InputError
from diffprune.flow import FIXED_STEP_METHODS, guided_velocity, sample_ode
from diffprune.models.autoencoder import Autoencoder
from diffprune.models.dit import DiT
from diffprune.ode import solve_adaptive
from diffprune.pieces import PieceSize, in_pieces

METHODS = (*FIXED_STEP_METHODS, "dopri5")
PRECISIONS = ("float32", "bf16")
STEPS = 50
RTOL, ATOL = 1e-3, 1e-6


@dataclass(frozen=True)
class Solver:
    """A method with what it takes: steps, or tolerances."""

    method: str
    steps: int | None
    rtol: float | None
    atol: float | None

    @classmethod
    def checked(cls, method: str, steps: int | None, rtol: float | None, atol: float | None) -> Solver:
        """The defaults filled in; InputError for an unknown method or an argument that it would ignore."""
        if method not in METHODS:
            raise InputError(f"method: expected {', '.join(METHODS)}, got {method!r}")
        if method != "dopri5":
            if rtol is not None or atol is not None:
                raise InputError(f"rtol and atol are dopri5's: {method} takes steps")
            return cls(method, steps or STEPS, None, None)
        if steps is not None:
            raise InputError("steps: dopri5 chooses its own; give rtol and atol")
        rtol, atol = RTOL if rtol is None else rtol, ATOL if atol is None else atol
        if not (0 <= rtol < math.inf and 0 < atol < math.inf):
            raise InputError(f"rtol, atol: expected rtol >= 0 and atol > 0, got {rtol} and {atol}")
        return cls(method, None, rtol, atol)

    @property
    def evaluations_per_step(self) -> int:
        return 1 if self.method == "euler" else 2

    def solve(
        self, velocity: Callable[..., Tensor], x: Tensor, start: float, end: float, steps: int | None
    ) -> tuple[Tensor, int]:
        """x at ``end``, and how many rows the velocity was asked for."""
        if self.method == "dopri5":
            solution = solve_adaptive(velocity, x, rtol=self.rtol, atol=self.atol, start=start, end=end)
            return solution.x, int(solution.evaluations.sum())
        x = sample_ode(velocity, x, steps, self.method, start=start, end=end)
        return x, steps * self.evaluations_per_step * len(x)


class Sampler:
    """A DiT and the VQ-VAE of its latents, perhaps a smaller DiT that begins, and how to draw from them."""

    def __init__(
        self,
        dit: tuple[DiT, dict[str, Any]],
        vqvae: tuple[Autoencoder, dict[str, Any]],
        coarse: tuple[DiT, dict[str, Any]] | None,
        coarse_until: float | None,
        device: torch.device,
    ) -> None:
        """Models with their checkpoints' states, as ``load_dit`` and ``load_vqvae`` give them."""
        self.device = device
        self.dit, self.dit_state = dit
        self.vqvae, self.vqvae_state = vqvae
        self._check_latents(self.dit_state)
        if not self.vqvae.latent_scale.isfinite():  # measured when the latents were made
            self.vqvae.latent_scale.fill_(self.dit_state["latents"]["latent_scale"])
        if (coarse is None) != (coarse_until is None):
            raise InputError("coarse and coarse_until: expected both or neither")
        self.coarse, self.coarse_state = coarse or (None, None)
        self.coarse_until = coarse_until
        if coarse is not None:
            if not 0 < coarse_until < 1:
                raise InputError(f"coarse_until: expected a time between 0 (noise) and 1 (data), got {coarse_until}")
            self._check_latents(self.coarse_state)
            for name in ("in_channels", "input_size", "num_classes", "null_label"):
                large, small = getattr(self.dit, name), getattr(self.coarse, name)
                if large != small:
                    raise InputError(
                        f"{self.coarse_state['path']}: {name} is {small}, but {large} in {self.dit_state['path']}; "
                        "expected two models of the same latents and labels"
                    )

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike,
        vqvae: str | os.PathLike,
        coarse: str | os.PathLike | None,
        coarse_until: float | None,
        weights: str,
        device: torch.device,
    ) -> Sampler:
        """From checkpoints or run folders."""
        small = None if coarse is None else load_dit(coarse, weights, device)
        return cls(load_dit(checkpoint, weights, device), load_vqvae(vqvae, device), small, coarse_until, device)

    def _check_latents(self, state: dict[str, Any]) -> None:
        if state.get("predicts", "velocity") != "velocity":
            raise InputError(
                f"{state['path']}: predicts {state['predicts']}: it can be scored with, but samples are drawn from a "
                "model that predicts a velocity; train one, `train dit --start-from` this one or another"
            )
        trained_on = (state.get("latents") or {}).get("model_sha256")
        if trained_on != self.vqvae_state["sha256"]:
            raise InputError(
                f"{state['path']}: was trained on latents of the VQ-VAE with sha256 {trained_on}, but "
                f"{self.vqvae_state['path']} has {self.vqvae_state['sha256']}; give the one that encoded its latents"
            )

    def set_up(
        self,
        solver: Solver,
        guidance: float,
        channels: int | None,
        labels: str | Sequence[int],
        seed: int,
        precision: str = "float32",
    ) -> None:
        """Check and keep the arguments of ``sample``."""
        if precision not in PRECISIONS:
            raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed: expected a number from 0 to 2**32 - 1, got {seed}")
        check_guidance(guidance, labels, self.dit.config)
        if channels is not None and not (guidance != 1 and 1 <= channels <= self.dit.in_channels):
            raise InputError(
                f"guidance_channels: expected 1 to {self.dit.in_channels}, with a guidance other than 1, got "
                f"{channels} with guidance {guidance}"
            )
        self.solver, self.guidance, self.channels, self.seed = solver, guidance, channels, seed
        self.precision = precision
        self.null_label = self.dit.null_label
        self.sequence = label_sequence(labels, self.dit.config)
        self.parts = self._parts()
        self.evaluations = {f"{which}_evaluations": 0 for which, *_ in self.parts}

    def _parts(self) -> list[tuple[str, DiT, float, float, int | None]]:
        """(which, model, from, to, steps) of each part of the way from noise to data."""
        steps, until = self.solver.steps, self.coarse_until
        if self.coarse is None:
            return [("model", self.dit, 0.0, 1.0, steps)]
        early = late = None
        if steps is not None:
            if steps < 2:
                raise InputError(f"steps: expected at least 2 with a coarse model, got {steps}")
            early = min(max(1, round(steps * until)), steps - 1)
            late = steps - early
        return [("coarse", self.coarse, 0.0, until, early), ("model", self.dit, until, 1.0, late)]

    def identity(self) -> dict[str, Any]:
        """What the images depend on beside the settings."""
        models = {"model_sha256": self.dit_state["sha256"], "vqvae_sha256": self.vqvae_state["sha256"]}
        if self.coarse_state:
            models["coarse_sha256"] = self.coarse_state["sha256"]
        return {**models, "labels": self.sequence}

    def planned_evaluations(self, images: int) -> dict[str, int | None]:
        """Rows through each DiT for so many images; None where they are only known afterwards."""
        rows = images * self.solver.evaluations_per_step * (2 if self.guidance != 1 else 1)
        return {f"{which}_evaluations": None if steps is None else rows * steps for which, *_, steps in self.parts}

    def add_evaluations(self, rows: Mapping[str, int]) -> None:
        """Count them: this process's, and what others that draw for it tell."""
        for name, more in rows.items():
            self.evaluations[name] += more

    def generate(self, indices: Sequence[int]) -> np.ndarray:
        """The images with these indices: uint8 [B, C, H, W]."""
        keys = [sample_key(index) for index in indices]
        size = self.dit.input_size
        latents = draw_noise(self.seed, keys, 0, (self.dit.in_channels, size, size), self.device)
        labels = [self.label(index) for index in indices]
        y = torch.tensor(labels, device=self.device) if self.sequence else None
        with torch.inference_mode():
            for which, model, start, end, steps in self.parts:
                latents, rows = self.solver.solve(self._velocity(model, y), latents, start, end, steps)
                self.add_evaluations({f"{which}_evaluations": rows * (2 if self.guidance != 1 else 1)})
            finite = latents.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                bad = [key for key, good in zip(keys, finite.tolist(), strict=True) if not good]
                raise DiffpruneError(
                    f"{self.dit_state['path']}: {len(bad)} of {len(keys)} generated latents are not finite, key "
                    f"{bad[0]!r} first; use a checkpoint from before the training diverged, or less guidance"
                )
            side = self.vqvae.image_size
            at_once = PieceSize(len(latents), side, side, self.device)
            images = in_pieces(lambda rows: self._pixels(latents[rows]), len(latents), at_once)
        return images.numpy()

    def _pixels(self, latents: Tensor) -> Tensor:
        """uint8 [B, C, H, W] in main memory."""
        return ((self.vqvae.decode(latents) + 1) * 127.5).round().to(torch.uint8).cpu()

    def _velocity(self, model: DiT, labels: Tensor | None) -> Callable[..., Tensor]:
        evaluated = in_precision(model, self.precision)

        def velocity(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
            own = labels if labels is None or rows is None else labels[rows]
            return guided_velocity(evaluated, x, t, own, self.guidance, self.null_label, self.channels)

        return velocity

    def label_counts(self, count: int) -> dict[str, int]:
        """How many of ``count`` samples get each label."""
        labels = [self.label(index) for index in range(count)] if self.sequence else []
        counts = sorted(Counter(labels).items())
        return {"null" if label == self.null_label else str(label): number for label, number in counts}

    def label(self, index: int) -> int | None:
        """The label of the sample with this index; None for an unconditional model."""
        return self.sequence[index % len(self.sequence)] if self.sequence else None


def in_precision(model: DiT, precision: str) -> Callable[..., Tensor]:
    """The model, perhaps under autocast; its velocity in x's dtype, as guidance takes the difference of two."""

    def evaluated(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(x, t, labels).to(x.dtype)

    return evaluated


def check_guidance(guidance: float, labels: str | Sequence[int], dit: DitConfig) -> None:
    """InputError for a scale that a model, asked for these labels, cannot be guided by."""
    if not math.isfinite(guidance):
        raise InputError(f"guidance: expected a finite number, got {guidance}")
    if guidance != 1 and dit.null_label is None:
        raise InputError(f"guidance: expected 1 for a model without a null label, got {guidance}")
    if guidance != 1 and labels == "null":
        raise InputError(f"guidance: expected 1 with labels null, got {guidance}")


def label_sequence(labels: str | Sequence[int], dit: DitConfig) -> list[int]:
    """The labels that samples take in turn; empty for an unconditional model. InputError for those it does not know."""
    if not dit.num_classes:
        if labels in ("uniform", "null"):
            return []
        raise InputError(f"labels: the model is unconditional: expected uniform or null, got {labels!r}")
    if labels == "uniform":
        return list(range(dit.num_classes))
    if labels == "null":
        if dit.null_label is None:
            raise InputError("labels: the model was trained without a null label (class_dropout_prob 0)")
        return [dit.null_label]
    try:
        chosen = [int(label) for label in (labels.split(",") if isinstance(labels, str) else labels)]
    except (TypeError, ValueError):
        raise InputError(f"labels: expected uniform, null, or class numbers such as 0,3,7, got {labels!r}") from None
    wrong = [label for label in chosen if not 0 <= label < dit.num_classes]
    if wrong or not chosen:
        found = wrong[0] if wrong else "none"
        raise InputError(f"labels: expected numbers from 0 to {dit.num_classes - 1}, got {found}")
    return chosen


def sample_key(index: int) -> str:
    """The key of the sample with this index."""
    return f"sample-{index:08d}"
