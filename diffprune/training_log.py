"""What a training run says about itself: log.jsonl, TensorBoard's files, and the pace on the progress line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffprune.errors import InputError
from diffprune.files import atomic_path
from diffprune.progress import Progress
from diffprune.storage import AnyPath
from diffprune.throughput import duration

LOG_FILE = "log.jsonl"
TENSORBOARD = "tensorboard"


class Pace:
    """Images per second, MFU and the time left: shown at each step, logged now and then."""

    def __init__(
        self, bar: Progress | None, batch_size: int, steps: int, first_step: int, image_seconds: float
    ) -> None:
        self.bar, self.batch_size, self.steps, self.done = bar, batch_size, steps, first_step
        # An image's operations over the matrix product rate: its seconds at an MFU of 1.
        self.image_seconds = image_seconds
        self.first = self.last_done = first_step
        self.start = self.last = time.monotonic()
        self.shown = 0.0

    def step(self, loss: float, grad_norm: float) -> None:
        self.done += 1
        if self.bar is not None:
            self.shown = self._rate(self.first, self.start)
            left = duration((self.steps - self.done) * self.batch_size / self.shown)
            self.bar.advance(
                self.batch_size,
                note=f"step {self.done:,} of {self.steps:,}  loss {loss:.4f}  gradient {grad_norm:.3g}  "
                f"MFU {self._mfu(self.shown)}  {left} left",
            )

    def since_last(self) -> dict[str, float]:
        """Since this was last asked for."""
        rate = self._rate(self.last_done, self.last)
        self.last_done, self.last = self.done, time.monotonic()
        return {"images_per_second": round(rate, 1), "mfu": round(rate * self.image_seconds, 4)}

    def whole(self) -> dict[str, float]:
        """Of the whole run; nothing where no step was done. Checkpoints and compiling are in it."""
        if self.done == self.first:
            return {}
        rate = self._rate(self.first, self.start)
        return {"images_per_second": round(rate, 1), "mfu": round(rate * self.image_seconds, 4)}

    def _rate(self, done: int, since: float) -> float:
        return (self.done - done) * self.batch_size / max(time.monotonic() - since, 1e-9)

    def _mfu(self, rate: float) -> str:
        return f"{100 * rate * self.image_seconds:.0f}%"


class MeanLoss:
    """Of all steps since the last multiple of ``every``: of a line of the log, and of those behind a checkpoint.

    ``state`` is kept in checkpoints, so that a resumed run tells the same means.
    """

    def __init__(self, every: int, state: Mapping[str, Any] | None) -> None:
        self.every, self.state = every, dict(state or {"steps": 0, "sum": 0.0})

    def add(self, step: int, loss: float) -> None:
        """The loss of step number ``step``, from 1."""
        if (step - 1) % self.every == 0:
            self.state = {"steps": 0, "sum": 0.0}
        self.state["steps"] += 1
        self.state["sum"] += loss

    @property
    def value(self) -> float:
        return self.state["sum"] / self.state["steps"]


class TrainingLog:
    """``log.jsonl``: a line per ``log_every`` steps; those of steps after the checkpoint resumed from are dropped.

    ``out`` is None on all ranks but the first, which writes for all; a URL's log gets its lines by ``keep``. With
    ``tensorboard`` each number is also a scalar of TensorBoard's, which hides those of dropped steps.
    """

    def __init__(self, out: AnyPath | None, first_step: int, tensorboard: bool) -> None:
        self.path, self.writer = None, None
        self.last: dict[str, float] = {}
        if out is None:
            return
        self.path = out / LOG_FILE
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.text = "".join(f"{line}\n" for line in lines if _logged_step(line) <= first_step)
        self._write_text()
        if tensorboard:
            self.writer = summary_writer()(str(out / TENSORBOARD), purge_step=first_step + 1)

    def write(self, step: int, pace: Pace, **numbers: float) -> None:
        self.last = numbers
        if self.path is None:
            return
        every = {**numbers, **pace.since_last()}
        line = json.dumps({"step": step, **every}) + "\n"
        if isinstance(self.path, Path):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        else:
            self.text += line
        if self.writer is not None:
            for name, value in every.items():
                self.writer.add_scalar(f"train/{name}", value, step)

    def keep(self) -> None:
        """Before a checkpoint: have all lines in storage, where nothing can be appended."""
        if self.path is not None and not isinstance(self.path, Path):
            self._write_text()

    def _write_text(self) -> None:
        with atomic_path(self.path) as temporary:
            temporary.write_text(self.text)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def summary_writer() -> type[Any]:
    """TensorBoard's writer; InputError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"train.tensorboard: needs the package tensorboard ({error}); pip install diffprune[tensorboard], or "
            "train without it"
        ) from error
    return SummaryWriter


def _logged_step(line: str) -> float:
    """The step of a line of the log; infinity for one that was cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
