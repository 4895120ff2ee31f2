"""One training step: draw, forward, backward, clip, AdamW, moving average; and what a checkpoint keeps of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffprune.checkpoints import check_tensors, read_tensors
from diffprune.config import TrainConfig
from diffprune.errors import DiffpruneError
from diffprune.ranks import Ranks
from diffprune.sharding import all_finite, fill, full_norm, is_sharded, own, whole, without_sync, wrapped
from diffprune.storage import AnyPath
from diffprune.training_order import batch_rows, step_generator

# Steps that the loss is compared with, to tell an explosion; fewer than the least say too little.
HISTORY, LEAST_HISTORY = 100, 20


class Objective:
    """What is trained on what. A ``Learner`` calls these in order, step by step."""

    kind: str
    """ "vqvae" or "dit"."""
    model: nn.Module
    device: torch.device
    ranks: Ranks
    keys: Sequence[str]
    """Sample keys; a row is an index into them."""
    data: dict[str, Any]
    """What identifies the training data."""
    latents: dict[str, Any] | None
    """What identifies the VQ-VAE behind the training data, if they are latents."""

    def rows(self, step: int, train: TrainConfig) -> Tensor:
        """The rows of a step's batch, [batch_size] int64."""
        return batch_rows(len(self.keys), train.batch_size, train.seed, step)

    def draw(self, rows: Tensor, share: slice, generator: torch.Generator) -> tuple[Tensor, ...]:
        """This process's ``share`` of the inputs of these rows, on the CPU, each [b, ...]; randomness for all rows from
        ``generator`` (CPU). Runs in a thread, a step ahead."""
        raise NotImplementedError

    def losses(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """The loss [b] float32 of each sample. ``model`` is ``self.model``, or stands for it and averages gradients."""
        raise NotImplementedError

    def after_step(self, generator: torch.Generator) -> None:
        """After the optimizer's step."""

    def before_checkpoint(self) -> None:
        """Before the model's tensors are saved."""

    def metrics(self) -> dict[str, float]:
        """More numbers of the last step, for the log."""
        return {}

    def report(self) -> dict[str, Any]:
        """How it is computed, for the report."""
        return {}

    def summary(self) -> dict[str, float]:
        """Of the run's last checkpoint, for the report."""
        return {}

    def more_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint has to keep beside the model: file name without suffix -> tensor name -> tensor."""
        return {}

    def restore(self, checkpoint: AnyPath, state: dict[str, Any]) -> None:
        """Put back what ``more_tensors`` gave."""

    def forward_of_one(self) -> None:
        """A forward pass of one image, on the meta device: to count operations."""
        raise NotImplementedError


class Draw(NamedTuple):
    """A step's batch."""

    step: int  # from 0
    rows: Tensor  # [batch_size], of all processes
    inputs: tuple[Tensor, ...]  # this process's
    generator: torch.Generator


class Stopped(DiffpruneError):
    """A step that must not reach the weights. ``details`` is what ``stopped.json`` says."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class Learner:
    """A model, its optimizer and the moving average of its weights."""

    def __init__(self, objective: Objective, train: TrainConfig, bfloat16: bool) -> None:
        self.objective, self.model, self.train, self.bfloat16 = objective, objective.model.train(), train, bfloat16
        if train.activation_checkpointing:
            self.model.activation_checkpointing = True
        if train.compile:
            self.model.compile_blocks()
        self.forward = wrapped(self.model, objective.ranks, train.sharding)
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=train.lr, weight_decay=train.weight_decay, fused=True
        )
        self.ema = {name: p.detach().clone() for name, p in self.trainable.items()} if train.ema_decay else {}
        # What is averaged, in this process's memory: the tensors never change, their values do.
        self.averaged = own(self.ema.values()), own(self.trainable.values())
        self.history: deque[float] = deque(maxlen=HISTORY)

    def draw(self, step: int) -> Draw:
        """What the ``step``-th step from 0 is made of."""
        objective = self.objective
        rows = objective.rows(step, self.train)
        generator = step_generator(self.train.seed, "step", step)
        inputs = objective.draw(rows, objective.ranks.share(len(rows)), generator)
        if objective.device.type == "cuda":
            inputs = tuple(tensor.pin_memory() for tensor in inputs)
        return Draw(step, rows, inputs, generator)

    def step(self, draw: Draw) -> tuple[float, float]:
        """One optimizer step; the loss and the norm of the gradient before clipping."""
        train, objective = self.train, self.objective
        losses = self._backward(draw)
        loss = losses.mean()
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
        # One wait for the device per step: a step that is not finite must not reach the weights.
        loss_value, norm_value = torch.stack([loss, full_norm(grad_norm)]).tolist()
        self._check(draw, losses, loss_value, norm_value)
        if train.grad_clip and norm_value + 1e-6 > train.grad_clip:  # else clipping is a product with 1
            nn.utils.clip_grads_with_norm_(self.trainable.values(), train.grad_clip, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, draw.step)
        self.optimizer.step()
        objective.after_step(draw.generator)
        if self.ema:
            decay = min(train.ema_decay, (1 + draw.step) / (10 + draw.step))
            torch._foreach_lerp_(*self.averaged, 1 - decay)
        return loss_value, norm_value

    def _backward(self, draw: Draw) -> Tensor:
        """The gradient of the mean loss of the whole batch, in ``accumulate`` parts; the losses [batch_size] of all."""
        objective, device = self.objective, self.objective.device
        self.optimizer.zero_grad(set_to_none=True)
        mine = len(draw.inputs[0])
        parts = list(
            zip(*(tensor.tensor_split(min(self.train.accumulate, mine)) for tensor in draw.inputs), strict=True)
        )
        found = []
        for number, part in enumerate(parts):
            inputs = [tensor.to(device, non_blocking=True) for tensor in part]
            with without_sync(self.forward, last=number == len(parts) - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
                    losses = objective.losses(self.forward, *inputs)
                loss = losses.mean()
                if len(parts) > 1:
                    loss = loss * (len(losses) / mine)
                loss.backward()
            found.append(losses.detach())
        return objective.ranks.gathered(torch.cat(found))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds. Every process has to ask, though only the first gets it where weights are sharded.

        DiffpruneError if a weight is not finite: such a checkpoint is not good.
        """
        finite = all_finite(self.trainable.values(), self.objective.ranks)
        if not all(finite):
            first = next(name for name, good in zip(self.trainable, finite, strict=True) if not good)
            raise DiffpruneError(
                f"weights are not finite, {first} first, and were not saved; checkpoints before stand; use a lower "
                f"train.lr (now {self.train.lr:g}) or a train.grad_clip"
            )
        files = {"model": self.model.state_dict(), "optimizer": {}, **self.objective.more_tensors()}
        if self.ema:
            files["ema"] = {**files["model"], **self.ema}
        for name, parameter in self.trainable.items():
            for moment, value in self.optimizer.state[parameter].items():
                files["optimizer"][f"{moment}.{name}"] = value
        return {name: self._whole(tensors) for name, tensors in files.items()}

    def averages(self) -> dict[str, Tensor]:
        """The weights to sample with, by name: moving averages, or without them the last ones. As ``tensors``."""
        return self._whole({**self.model.state_dict(), **self.ema})

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not any(map(is_sharded, tensors.values())):
            return tensors
        found = {}
        for name, tensor in tensors.items():  # one at a time, and kept on the CPU: all together may not fit a device
            value = whole(tensor)
            if self.objective.ranks.rank == 0:
                found[name] = value.cpu()
        return found

    def restore(self, checkpoint: AnyPath, state: dict[str, Any]) -> None:
        """Put back what ``tensors`` gave."""
        found = {name: read_tensors(checkpoint, state, name) for name in ("optimizer", "model")}
        if self.ema:
            found["ema"] = read_tensors(checkpoint, state, "ema")
        model = self.model.state_dict()
        moments = {
            f"{moment}.{name}": torch.empty(p.shape if moment != "step" else (), device="meta")
            for name, p in self.trainable.items()
            for moment in ("step", "exp_avg", "exp_avg_sq")
        }
        for name, expected in {"model": model, "ema": model, "optimizer": moments}.items():
            if name in found:
                check_tensors(found[name], expected, checkpoint / f"{name}.safetensors")
        for name, tensor in model.items():
            fill(tensor, found["model"][name])
        for name, average in self.ema.items():
            fill(average, found["ema"][name])
        for name, parameter in self.trainable.items():
            values = {moment: found["optimizer"][f"{moment}.{name}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
            averages = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            for moment, tensor in averages.items():
                fill(tensor, values[moment])
            self.optimizer.state[parameter] = {"step": values["step"].to(parameter.device), **averages}
        self.objective.restore(checkpoint, state)

    def _check(self, draw: Draw, losses: Tensor, loss: float, grad_norm: float) -> None:
        usual, factor = median(self.history or [0.0]), self.train.explosion_factor
        exploded = factor and len(self.history) >= LEAST_HISTORY and loss > factor * usual
        if abs(loss) + grad_norm < float("inf") and not exploded:
            self.history.append(loss)
            return
        bad = (~losses.isfinite()).cpu()
        what = f"the loss is not finite for {int(bad.sum())} of {len(losses)} samples"
        if not bad.any():
            bad = torch.ones(len(losses), dtype=torch.bool)
            what = f"the gradient's norm is {grad_norm}"
            if exploded:
                what = f"the loss is {loss:.4g}, over {factor:g} times the usual {usual:.4g}"
        all_keys = [self.objective.keys[row] for row in draw.rows.tolist()]
        # Of finite losses the largest first: they are what to look at.
        order = sorted(torch.nonzero(bad).flatten().tolist(), key=lambda place: -_finite(losses[place].item()))
        keys = [all_keys[place] for place in order]
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        # Other samples, lr or clipping make another run, which this folder's checkpoints do not go on with.
        start = " that begins with --start-from the last one" if self.objective.kind == "dit" else ""
        message = (
            f"training stopped at step {draw.step + 1}: {what}, keys {', '.join(keys[:8])}{more}; checkpoints before "
            f"it stand; leave these samples out, or use a lower train.lr (now {self.train.lr:g}) or a train.grad_clip, "
            f"in another run folder{start}"
        )
        each = [{"key": key, "loss": _text(value)} for key, value in zip(all_keys, losses.tolist(), strict=True)]
        details = {"step": draw.step + 1, "reason": what, "loss": _text(loss), "grad_norm": _text(grad_norm)}
        raise Stopped(message, {**details, "samples": each})


def learning_rate(train: TrainConfig, step: int) -> float:
    """Constant after a linear warm-up; it knows nothing of ``train.steps``, so a longer run begins as a shorter one."""
    return train.lr * min(1.0, (step + 1) / max(1, train.warmup_steps))


def _finite(value: float) -> float:
    return value if abs(value) < float("inf") else 0.0


def _text(value: float) -> float | str:
    """JSON has no NaN."""
    return value if abs(value) < float("inf") else str(value)
