"""The surrogate that scores come from: checkpoints of one training run, and how its network is run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from diffprune.checkpoints import list_checkpoints, load_dit, read_state
from diffprune.errors import InputError
from diffprune.scores.batches import PREDICTS, Network
from diffprune.storage import AnyPath

PRECISIONS = ("float32", "bf16")


class Surrogate:
    """Checkpoints in order of training. One model at a time is in memory.

    Args:
        checkpoints: run folders (all their checkpoints) or checkpoints.
        weights: "model" or "ema".
        only_last: leave out all checkpoints but the last.
        learning_rates: η of each checkpoint in the order given, or one for all; by default what the checkpoints say.
        compile, precision: see `diffprune.scoring.score`.
    """

    def __init__(
        self,
        checkpoints: str | os.PathLike | Sequence[str | os.PathLike],
        weights: str,
        device: torch.device,
        *,
        only_last: bool = False,
        learning_rates: Sequence[float] | None = None,
        compile: bool = False,
        precision: str = "float32",
    ) -> None:
        given = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else checkpoints
        paths = [path for one in given for path in list_checkpoints(one)]
        if not paths:
            raise InputError("checkpoints: expected a run folder or checkpoints of `diffprune train dit`, got none")
        steps = {path: read_state(path)["step"] for path in paths}
        if len(set(steps.values())) < len(paths):
            raise InputError(f"checkpoints: expected different steps of one run, got {', '.join(map(str, paths))}")
        rates = dict(zip(paths, _checked_rates(learning_rates, paths), strict=True)) if learning_rates else {}
        self.paths = sorted(paths, key=lambda path: steps[path])[-1 if only_last else 0 :]
        self.device, self._compile, self._bf16 = device, compile, precision == "bf16"
        self._weights, self._loaded = weights, None
        self.states = [self._load(path)[1] for path in self.paths]  # reads every file: damage shows before the work
        self.rates = [rates.get(path, state["lr"]) for path, state in zip(self.paths, self.states, strict=True)]
        self.num_classes = self.network(-1).model.num_classes
        if len(found := {self._predicts(state) for state in self.states}) > 1:
            raise InputError(f"checkpoints: expected all to predict the same, found {' and '.join(sorted(found))}")
        self.predicts = found.pop()

    def network(self, number: int) -> Network:
        """One checkpoint's model in eval mode."""
        return self._load(self.paths[number])[0]

    def check(self, shape: Sequence[int], made_by: str | None, latents: str) -> None:
        """Raise InputError unless it was trained on latents of this shape, made by the VQ-VAE of this sha256."""
        for path, state in zip(self.paths, self.states, strict=True):
            config = state["config"]["model"]
            expected = (config["in_channels"], config["input_size"], config["input_size"])
            if tuple(shape) != expected:
                raise InputError(f"{latents}: {path} expects latents of shape {expected}, found {tuple(shape)}")
            if config["num_classes"] != self.num_classes:
                raise InputError(
                    f"{path}: expected {self.num_classes} classes as in {self.paths[-1]}, found {config['num_classes']}"
                )
            trained_on = (state.get("latents") or {}).get("model_sha256")
            if trained_on and made_by and trained_on != made_by:
                raise InputError(
                    f"{latents}: made by the VQ-VAE {made_by[:12]}…, but {path} was trained on latents of "
                    f"{trained_on[:12]}…; encode the images with that VQ-VAE, or train a surrogate on these latents"
                )

    def describe(self) -> dict[str, Any]:
        """What identifies it in a fingerprint."""
        found: dict[str, Any] = {"checkpoints": [state["sha256"] for state in self.states]}
        if self._compile:
            found["compile"] = True
        if self._bf16:
            found["precision"] = "bf16"
        if self.predicts != "velocity":
            found["predicts"] = self.predicts
        return found

    def training(self) -> list[list[float]] | None:
        """(T, η) of each checkpoint where the weights do not tell: of one that ``convert`` made they are as given."""
        if not any("predicts" in state for state in self.states):
            return None
        return [[state["total_steps"], rate] for state, rate in zip(self.states, self.rates, strict=True)]

    def _load(self, path: AnyPath) -> tuple[Network, dict[str, Any]]:
        if self._loaded is None or self._loaded[1]["path"] != str(path):
            self._loaded = None  # before the next one is there
            model, state = load_dit(path, weights=self._weights, device=self.device)
            compiled = torch.compile(model.eval()) if self._compile else None
            self._loaded = Network(model.eval(), compiled, self._bf16, self._predicts(state)), state
        return self._loaded

    @staticmethod
    def _predicts(state: dict[str, Any]) -> str:
        found = state.get("predicts", "velocity")
        if found not in PREDICTS:
            raise InputError(f"{state['path']}: predicts: expected one of {', '.join(PREDICTS)}, found {found!r}")
        return found


def _checked_rates(learning_rates: Sequence[float], paths: Sequence[AnyPath]) -> list[float]:
    rates = [float(rate) for rate in learning_rates]
    if len(rates) == 1:
        rates *= len(paths)
    if len(rates) != len(paths) or not all(rate > 0 and math.isfinite(rate) for rate in rates):
        raise InputError(
            f"learning_rates: expected one positive number, or one for each of {len(paths)} checkpoints, got {rates}"
        )
    return rates
