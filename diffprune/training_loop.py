"""How a training run goes: order of samples, optimizer, moving average, log, checkpoints, resume.

All randomness of a step is a function of (seed, step), so a resumed run needs no generator's state: it does what the
run would have done that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffprune.checkpoints import check_tensors, find_checkpoints, read_state, read_tensors, save_checkpoint
from diffprune.config import Run, TrainConfig, to_dict
from diffprune.errors import DiffpruneError, InputError, ResumeError
from diffprune.files import atomic_path
from diffprune.progress import progress

LOG_FILE = "log.jsonl"
# What a resumed run may change: none of it alters what a step does.
_FREE = {"train.steps", "train.checkpoint_every", "train.log_every", "train.device"}


class Objective:
    """What is trained on what. ``run_training`` calls these in order, step by step."""

    kind: str
    """ "vqvae" or "dit"."""
    model: nn.Module
    device: torch.device
    keys: Sequence[str]
    """Sample keys; a row is an index into them."""
    data: dict[str, Any]
    """What identifies the training data."""
    latents: dict[str, Any] | None
    """What identifies the VQ-VAE behind the training data, if they are latents."""

    def losses(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The loss [B] float32 of each of these rows (CPU int64); randomness from ``generator`` (CPU)."""
        raise NotImplementedError

    def after_step(self, generator: torch.Generator) -> None:
        """After the optimizer's step."""

    def before_checkpoint(self) -> None:
        """Before the model's tensors are saved."""

    def metrics(self) -> dict[str, float]:
        """More numbers of the last step, for the log."""
        return {}


def run_training(objective: Objective, run: Run, out: str | Path, *, resume: bool, dry_run: bool) -> dict[str, Any]:
    """Train to ``run.train.steps`` steps, from the last checkpoint in ``out`` if there is one. See ``train_vqvae``."""
    out, train = Path(out), run.train
    checkpoint, state = _last_checkpoint(objective, run, out, resume)
    first_step = state["step"] if state else 0
    bfloat16 = _use_bfloat16(train.precision, objective.device)
    report = {
        "kind": objective.kind,
        "out": str(out),
        "images": len(objective.keys),
        "parameters": sum(p.numel() for p in objective.model.parameters()),
        "device": str(objective.device),
        "precision": "bfloat16" if bfloat16 else "float32",
        "steps": train.steps,
        "first_step": first_step,
        "images_seen": train.steps * train.batch_size,
        "epochs": train.steps * train.batch_size / len(objective.keys),
    }
    if dry_run:
        return {**report, "dry_run": True}
    learner = _Learner(objective, train, bfloat16)
    if state:
        learner.restore(checkpoint, state)
    log = _Log(out / LOG_FILE, first_step)
    loss = None
    with progress(f"train {objective.kind}", total=(train.steps - first_step) * train.batch_size, unit="images") as bar:
        for step in range(first_step, train.steps):
            loss, grad_norm = learner.step(step)
            done = step + 1
            bar.advance(train.batch_size, note=f"step {done:,} of {train.steps:,}  loss {loss:.4f}")
            if done % train.log_every == 0 or done == train.steps:
                log.write(done, train.batch_size, loss=loss, grad_norm=grad_norm, **objective.metrics())
            if done % train.checkpoint_every == 0 or done == train.steps:
                checkpoint = _save(learner, run, out, done)
    return {**report, "checkpoint": str(checkpoint), "loss": loss, **log.last}


def batch_rows(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The rows of a step's batch, [batch_size] int64 below ``count``.

    Batches are consecutive pieces of an endless sequence, one random permutation of all rows after the other. So each
    epoch sees each row once, and a batch may span epochs: with fewer rows than ``batch_size`` rows repeat in it.
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // count
    parts = []
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        parts.append(_permutation(count, seed, epoch)[positions[epochs == epoch] % count])
    return torch.cat(parts)


def step_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator for one purpose (``stream``) and one step or epoch."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=step_generator(seed, "epoch", epoch))


class _Learner:
    """A model, its optimizer and the moving average of its weights."""

    def __init__(self, objective: Objective, train: TrainConfig, bfloat16: bool) -> None:
        self.objective, self.model, self.train, self.bfloat16 = objective, objective.model.train(), train, bfloat16
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=train.lr, weight_decay=train.weight_decay, fused=True
        )
        self.ema = {name: p.detach().clone() for name, p in self.trainable.items()} if train.ema_decay else {}

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step, the ``step``-th from 0; the loss and the norm of the gradient before clipping."""
        train, objective = self.train, self.objective
        rows = batch_rows(len(objective.keys), train.batch_size, train.seed, step)
        generator = step_generator(train.seed, "step", step)
        with torch.autocast(objective.device.type, torch.bfloat16, enabled=self.bfloat16):
            losses = objective.losses(rows, generator)
        loss = losses.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = train.grad_clip or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.trainable.values(), limit)
        # One wait for the device per step: a step that is not finite must not reach the weights.
        loss_value, norm_value = torch.stack([loss.detach(), grad_norm]).tolist()
        if not abs(loss_value) + norm_value < float("inf"):
            self._refuse(step, rows, losses, norm_value)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        self.optimizer.step()
        objective.after_step(generator)
        if self.ema:
            decay = min(train.ema_decay, (1 + step) / (10 + step))
            averages = list(self.ema.values())
            torch._foreach_lerp_(averages, [p.detach() for p in self.trainable.values()], 1 - decay)
        return loss_value, norm_value

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds."""
        model = self.model.state_dict()
        files = {"model": model, "optimizer": {}}
        if self.ema:
            files["ema"] = {**model, **self.ema}
        for name, parameter in self.trainable.items():
            for moment, value in self.optimizer.state[parameter].items():
                files["optimizer"][f"{moment}.{name}"] = value
        return files

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Put back what ``tensors`` gave."""
        found = {name: read_tensors(checkpoint, state, name) for name in ("model", "optimizer")}
        if self.ema:
            found["ema"] = read_tensors(checkpoint, state, "ema")
        model = self.model.state_dict()
        moments = {
            f"{moment}.{name}": torch.zeros_like(p, dtype=torch.float32) if moment != "step" else torch.zeros(())
            for name, p in self.trainable.items()
            for moment in ("step", "exp_avg", "exp_avg_sq")
        }
        for name, expected in {"model": model, "ema": model, "optimizer": moments}.items():
            if name in found:
                check_tensors(found[name], expected, checkpoint / f"{name}.safetensors")
        self.model.load_state_dict(found["model"])
        for name, average in self.ema.items():
            average.copy_(found["ema"][name])
        for name, parameter in self.trainable.items():
            self.optimizer.state[parameter] = {
                moment: found["optimizer"][f"{moment}.{name}"].to(parameter.device)
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }

    def _refuse(self, step: int, rows: Tensor, losses: Tensor, grad_norm: float) -> None:
        bad = (~losses.detach().isfinite()).cpu()
        what = f"the loss is not finite for {int(bad.sum())} of {len(rows)} samples"
        if not bad.any():
            bad, what = torch.ones(len(rows), dtype=torch.bool), f"the gradient's norm is {grad_norm}"
        keys = [self.objective.keys[row] for row in rows[bad].tolist()]
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        raise DiffpruneError(
            f"training stopped at step {step + 1}: {what}, keys {', '.join(keys[:8])}{more}; checkpoints before it "
            f"stand; look at these samples, or use a lower train.lr (now {self.train.lr:g}) or a train.grad_clip"
        )


class _Log:
    """``log.jsonl``: a line per ``log_every`` steps; those of steps after the checkpoint resumed from are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path, self.since, self.step, self.last = path, time.monotonic(), first_step, {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _logged_step(line) <= first_step))

    def write(self, step: int, batch_size: int, **numbers: float) -> None:
        now = time.monotonic()
        rate = (step - self.step) * batch_size / max(now - self.since, 1e-9)
        self.step, self.since, self.last = step, now, numbers
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers, "images_per_second": round(rate, 1)}) + "\n")


def learning_rate(train: TrainConfig, step: int) -> float:
    """Constant after a linear warm-up; it knows nothing of ``train.steps``, so a longer run begins as a shorter one."""
    return train.lr * min(1.0, (step + 1) / max(1, train.warmup_steps))


def _save(learner: _Learner, run: Run, out: Path, step: int) -> Path:
    objective, train = learner.objective, run.train
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
    return save_checkpoint(out, state, learner.tensors())


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
    theirs = {"kind": state["kind"], **_flat(state["config"]), **_flat({"data": state["data"]})}
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
