"""Images scored per second by `grand`, against one image at a time and against a plain training step.

    python -m pytest benchmarks/bench_grand.py --benchmark-enable

One surrogate (half of DiT-S/4, 32×32×4 latents, 10 classes), one batch of 32, float32. Without --benchmark-enable only
the check runs: per-sample norms must equal the loop's, or no speed is reported.
"""

from __future__ import annotations

import os
import platform

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffprune.draws import draw_pair
from diffprune.flow import interpolate, velocity_loss, velocity_target
from diffprune.models.dit import DiT
from diffprune.per_sample import per_sample_gradients

BATCH = 32
seconds: dict[str, float] = {}  # median, by way
giga_operations: dict[str, float] = {}


class Problem:
    """The model, a batch at one draw, and three ways through it."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator().manual_seed(0)
        self.model = DiT(patch_size=4, hidden_size=384, depth=6, num_heads=6, num_classes=10, learn_sigma=False).eval()
        for parameter in self.model.parameters():  # adaLN-Zero's zeros would make most gradients zero
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        self.model.to(self.device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.x1 = torch.randn(BATCH, 4, 32, 32, generator=generator).to(self.device)
        self.labels = torch.randint(0, 10, (BATCH,), generator=generator).to(self.device)
        self.t, self.x0 = (x.to(self.device) for x in draw_pair(0, [str(i) for i in range(BATCH)], 0, 1, (4, 32, 32)))

    def losses(self, rows: slice = slice(None)) -> Tensor:
        x1, x0, t = self.x1[rows], self.x0[rows], self.t[rows]
        return velocity_loss(self.model(interpolate(x1, x0, t), t, self.labels[rows]), velocity_target(x1, x0))

    def per_sample(self) -> Tensor:
        with per_sample_gradients(self.model) as grads:
            self.losses().sum().backward()
        return self.ready(grads.sqnorm.sqrt())

    def loop(self) -> Tensor:
        norms = []
        for i in range(BATCH):
            gradients = torch.autograd.grad(self.losses(slice(i, i + 1)).sum(), self.parameters)
            norms.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())
        return self.ready(torch.stack(norms))

    def training_step(self) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        self.losses().mean().backward()
        return self.ready(self.parameters[0].grad)

    def ready(self, result: Tensor) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return result

    def giga_operations(self, way: str) -> float:
        """Of matrix products and attention; 2 per multiply-add."""

        def sqnorm(input: list[int], grad_output: list[int], *args: object, **kwargs: object) -> int:
            (batch, tokens, wide), high = input, grad_output[2]
            return 2 * batch * min(tokens * wide * high, tokens**2 * (wide + high))

        operator = torch.ops.diffprune.linear_grad_sqnorm
        with FlopCounterMode(display=False, custom_mapping={operator: sqnorm}) as counter:
            getattr(self, way)()
        return counter.get_total_flops() / 1e9


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Fails where the two ways disagree: a wrong result has no speed."""
    problem = Problem()
    got, expected = problem.per_sample().double(), problem.loop().double()
    worst = ((got - expected) / expected).abs().max().item()
    if not worst < 1e-4:
        pytest.fail(f"per-sample gradients differ from the loop by {worst:.1e} relative; no speed is reported")
    return problem


@pytest.mark.parametrize("way", ["per_sample", "loop", "training_step"])
def test_images_per_second(benchmark, problem, way):
    benchmark.pedantic(getattr(problem, way), rounds=3)
    if benchmark.enabled:
        seconds[way] = benchmark.stats.stats.median
        giga_operations[way] = problem.giga_operations(
            "training_step" if way == "loop" else way
        )  # the loop's are equal
        benchmark.extra_info.update(images_per_second=BATCH / seconds[way], giga_operations=giga_operations[way])


def test_report(problem, capsys):
    if len(seconds) < 3:
        pytest.skip("timed with --benchmark-enable only")
    device = torch.cuda.get_device_name() if problem.device.type == "cuda" else platform.processor() or "CPU"
    parameters = sum(parameter.numel() for parameter in problem.parameters)
    lines = [
        f"grand, half of DiT-S/4 ({parameters / 1e6:.1f}M parameters), 64 tokens, batch {BATCH}, float32",
        f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    ]
    for way, took in seconds.items():
        lines.append(
            f"{way:>14}: {BATCH / took:8.2f} images/s  {took:7.3f} s  {giga_operations[way]:7.1f} GFLOP  "
            f"{giga_operations[way] / took:7.1f} GFLOP/s"
        )
    lines.append(f"per_sample is {seconds['loop'] / seconds['per_sample']:.2f} times as fast as the loop, and takes")
    lines.append(f"{seconds['per_sample'] / seconds['training_step']:.2f} times as long as a training step's gradient")
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))
