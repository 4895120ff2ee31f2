"""A training step of DiT-S/4 by the trainer, against the plain eager step of the same model in the same run.

    python -m pytest benchmarks/bench_training.py --benchmark-enable

The plain step is what a short script does: float32, AdamW without `fused`, a moving average parameter by parameter,
data drawn in the loop. The trainer's ways: as configured by default, with compiled blocks, with this package's ops
(`train.ops=diffprune`) in place of PyTorch's, and in bfloat16 where the device multiplies it (elsewhere it is emulated,
slower, and left out; the goal of 1.5 times the plain step is for devices that have it). Each way trains the same steps
on the same draws; its loss curve must lie over the plain one's, or no speed is reported. Ways take turns, step by step,
so that other work on the machine falls on all of them alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffprune.config import DitConfig, DitRun, TrainConfig
from diffprune.dit_objective import DitObjective
from diffprune.flow import interpolate, velocity_loss, velocity_target
from diffprune.learner import Draw, Learner
from diffprune.models.dit import DiT
from diffprune.ranks import Ranks
from diffprune.throughput import matmul_rate, step_operations

BATCH, CHECK_STEPS, TIMED_STEPS = 4, 3, 7
MODEL = DitConfig(
    input_size=32, patch_size=4, in_channels=4, hidden_size=384, depth=12, num_heads=6, num_classes=10, time_scale=1.0
)
# Of a step's loss, relative: float32 sums in another order; bfloat16 products.
FLOAT32, BFLOAT16 = 1e-4, 2e-2
GOAL = 1.5


class Plain:
    """The eager step, written out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = DiT(**asdict(MODEL)).to(device)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, weight_decay=0.0, foreach=False, fused=False)
        self.ema = [p.detach().clone() for p in self.trainable]

    def step(self, draw: Draw) -> float:
        x1, x0, t, labels = (tensor.to(self.device) for tensor in draw.inputs)
        loss = velocity_loss(self.model(interpolate(x1, x0, t), t, labels), velocity_target(x1, x0)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        decay = min(0.9999, (1 + draw.step) / (10 + draw.step))
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.trainable, strict=True):
                average.mul_(decay).add_(parameter, alpha=1 - decay)
        return loss.item()


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 here: measured."""
    return matmul_rate(device, torch.bfloat16) > 1.2 * matmul_rate(device, torch.float32)


def learner(device: torch.device, *, bfloat16: bool = False, **options) -> Learner:
    train = TrainConfig(steps=100, batch_size=BATCH, lr=1e-4, device=str(device), **options)
    generator = np.random.default_rng(0)
    values = generator.standard_normal((256, 4, 32, 32)).astype(np.float16)
    labels = torch.from_numpy(generator.integers(0, 10, 256))
    keys = [str(number) for number in range(len(values))]
    objective = DitObjective(DitRun(MODEL, train), Ranks(), device, keys, values, None, labels, {})
    return Learner(objective, train, bfloat16)


class Ways:
    """Each way's steps, their losses and seconds."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        default = learner(self.device)
        self.draw: Callable[[int], Draw] = default.draw
        self.steps: dict[str, Callable[[Draw], float]] = {
            "plain": Plain(self.device).step,
            "default": lambda draw: default.step(draw)[0],
        }
        others = {"compiled": {"compile": True}, "ops": {"ops": "diffprune"}}
        if has_bfloat16(self.device):
            others |= {"bfloat16": {"bfloat16": True}, "bfloat16, compiled": {"bfloat16": True, "compile": True}}
        for name, options in others.items():
            one = learner(self.device, **options)
            self.steps[name] = lambda draw, one=one: one.step(draw)[0]
        self.losses: dict[str, list[float]] = {name: [] for name in self.steps}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.steps}

    def run(self, first: int, count: int) -> None:
        for step in range(first, first + count):
            for name, way in self.steps.items():
                begin = time.perf_counter()
                self.losses[name].append(way(self.draw(step)))  # a loss is waited for
                self.seconds[name].append(time.perf_counter() - begin)

    def check(self) -> None:
        """Fails where a curve leaves the plain one: a wrong step has no speed."""
        for name in self.losses:
            worst = self.distance(name)
            if not worst < (BFLOAT16 if "bfloat16" in name else FLOAT32):
                pytest.fail(f"{name}: the loss leaves the plain step's by {worst:.1e} relative; no speed is reported")

    def distance(self, name: str) -> float:
        """The largest distance of a loss from the plain step's, relative."""
        plain = torch.tensor(self.losses["plain"])
        return ((torch.tensor(self.losses[name]) - plain).abs() / plain).max().item()


@pytest.fixture(scope="module")
def ways(request: pytest.FixtureRequest) -> Ways:
    if not request.config.getoption("--benchmark-enable"):
        pytest.skip("half a minute of compiling: with --benchmark-enable only")
    ways = Ways()
    ways.run(0, CHECK_STEPS)  # these compile, and are not timed
    ways.check()
    return ways


def test_training_step(benchmark, ways, capsys):
    for seconds in ways.seconds.values():
        seconds.clear()
    benchmark.pedantic(lambda: ways.run(CHECK_STEPS, TIMED_STEPS), rounds=1)
    ways.check()
    objective_operations = BATCH * step_operations(_forward)
    device = torch.cuda.get_device_name() if ways.device.type == "cuda" else platform.processor() or "CPU"
    lines = [
        f"DiT-S/4 ({sum(p.numel() for p in DiT(**asdict(MODEL)).parameters()) / 1e6:.1f}M parameters), batch {BATCH}, "
        f"{objective_operations / 1e9:.1f} GFLOP a step, {TIMED_STEPS} steps of each in turn",
        f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    ]
    plain = statistics.median(ways.seconds["plain"])
    for name, seconds in ways.seconds.items():
        took = statistics.median(seconds)
        dtype = torch.bfloat16 if name.startswith("bfloat16") else torch.float32
        mfu = objective_operations / took / matmul_rate(ways.device, dtype)
        spread = (max(seconds) - min(seconds)) / took
        lines.append(
            f"{name:>18}: {BATCH / took:7.2f} images/s  {took:6.3f} s (spread {spread:4.0%})  MFU {mfu:4.0%}  "
            f"{plain / took:.2f} times the plain step, losses within {ways.distance(name):.0e}"
        )
        benchmark.extra_info[name] = {"seconds": took, "speedup": plain / took, "losses": ways.losses[name]}
    if not has_bfloat16(ways.device):
        lines.append("bfloat16 is not faster than float32 here: left out, and with it the goal of 1.5 times")
    else:
        best = max(plain / statistics.median(s) for name, s in ways.seconds.items() if name != "plain")
        lines.append(f"goal: {GOAL} times the plain step: {best:.2f}, {'met' if best >= GOAL else 'missed'}")
    lines.append("losses: " + "; ".join(f"{n} {' '.join(f'{v:.4f}' for v in x)}" for n, x in ways.losses.items()))
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))


def _forward() -> Tensor:
    latent = torch.zeros(1, MODEL.in_channels, MODEL.input_size, MODEL.input_size)
    return DiT(**asdict(MODEL))(latent, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
