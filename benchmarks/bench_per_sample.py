"""Per-sample gradients of a batch, against a plain training step and against other ways to get them.

    python -m pytest benchmarks/bench_per_sample.py --benchmark-enable -s

DiT-S/4 on 32×32×4 latents, 10 classes, a batch of 32, float32, random weights. `grand` is the norms alone; `moso`
norms, dot products and the batch's gradient in one pass; `total` the same with a float64 total that does not depend on
how samples are grouped. Opacus (ghost norms) needs `.train()`, and runs where it is
installed. All must agree, or no speed is reported. Without --benchmark-enable only that is checked, on a smaller model.

On the CPU a run is timed by the processor time it takes, all threads together: other programs then disturb it least.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.memory import peak_bytes
from diffprune.draws import draw_pair
from diffprune.flow import interpolate, velocity_loss, velocity_target
from diffprune.models.dit import DiT
from diffprune.per_sample import per_sample_gradients

WAYS = ("training_step", "grand", "moso", "total", "loop", "vmap", "opacus")
ROUNDS = 3


class Problem:
    """The model, a batch at one draw, and the ways through it. Each returns the norms [B], or what it has."""

    def __init__(self, name: str, batch: int) -> None:
        self.name, self.batch = name, batch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator().manual_seed(0)
        self.model = DiT.from_name(name, num_classes=10, learn_sigma=False).eval()
        for parameter in self.model.parameters():  # adaLN-Zero's zeros would make most gradients zero
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        self.model.to(self.device)
        self.parameters = {key: p for key, p in self.model.named_parameters() if p.requires_grad}
        self.direction = {key: torch.randn_like(p) for key, p in self.parameters.items()}
        self.x1 = torch.randn(batch, 4, 32, 32, generator=generator).to(self.device)
        self.labels = torch.randint(0, 10, (batch,), generator=generator).to(self.device)
        self.t, self.x0 = (x.to(self.device) for x in draw_pair(0, [str(i) for i in range(batch)], 0, 1, (4, 32, 32)))
        self.products: Tensor | None = None
        self.sums: dict[str, Tensor] = {}

    def losses(self, rows: slice = slice(None), model: torch.nn.Module | None = None) -> Tensor:
        x1, x0, t = self.x1[rows], self.x0[rows], self.t[rows]
        velocity = (model or self.model)(interpolate(x1, x0, t), t, self.labels[rows])
        return velocity_loss(velocity, velocity_target(x1, x0))

    def training_step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        self.losses().mean().backward()

    def grand(self) -> Tensor:
        with per_sample_gradients(self.model) as grads:
            self.losses().sum().backward()
        return grads.sqnorm.sqrt()

    def moso(self) -> Tensor:
        for parameter in self.parameters.values():
            parameter.grad = None
        with per_sample_gradients(self.model, direction=self.direction, weight_gradients=True) as grads:
            self.losses().sum().backward()
        self.products, self.sums = grads.dot, {key: p.grad for key, p in self.parameters.items()}
        return grads.sqnorm.sqrt()

    def total(self) -> Tensor:
        with per_sample_gradients(self.model, direction=self.direction, total=True) as grads:
            self.losses().sum().backward()
        self.products, self.sums = grads.dot, grads.total
        return grads.sqnorm.sqrt()

    def loop(self) -> Tensor:
        norms, products = [], []
        for i in range(self.batch):
            gradients = torch.autograd.grad(self.losses(slice(i, i + 1)).sum(), list(self.parameters.values()))
            norms.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
            pairs = zip(gradients, self.direction.values(), strict=True)
            products.append(torch.stack([(g * d).sum() for g, d in pairs]).sum())
        self.products = torch.stack(products)
        return torch.stack(norms)

    def vmap(self) -> Tensor:
        frozen = {key: p for key, p in self.model.named_parameters() if not p.requires_grad}
        target, xt = velocity_target(self.x1, self.x0), interpolate(self.x1, self.x0, self.t)

        def loss(parameters: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, target: Tensor) -> Tensor:
            one = (x[None], t[None], y[None])
            return velocity_loss(functional_call(self.model, (parameters, frozen), one), target[None]).sum()

        parameters = {key: p.detach() for key, p in self.parameters.items()}
        gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, xt, self.t, self.labels, target)
        return torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()

    def opacus(self) -> Tensor:
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleModuleFastGradientClipping,
        )

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.train()
            hooked = GradSampleModuleFastGradientClipping(
                self.model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum", strict=False
            )
            try:
                self.losses(model=hooked).sum().backward()
                return hooked.get_norm_sample()
            finally:
                hooked.to_standard_module()
                self.model.eval()
                for parameter in self.parameters.values():
                    parameter.grad = None

    def run(self, way: str) -> Tensor | None:
        result = getattr(self, way)()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return result


def ways() -> list[str]:
    return [way for way in WAYS if way != "opacus" or find_spec("opacus")]


def disagreement(problem: Problem) -> str | None:
    """What differs from the loop by more than 1e-4, if anything does."""
    expected = problem.run("loop").double()
    products = problem.products.double()
    for way in ways()[1:]:
        if way != "loop":
            worst = ((problem.run(way).double() - expected) / expected).abs().max().item()
            if not worst < 1e-4:
                return f"norms by {way} differ from the loop's by {worst:.1e} relative"
    size = expected * torch.stack([d.double().square().sum() for d in problem.direction.values()]).sum().sqrt()
    for way in ("moso", "total"):
        problem.run(way)
        worst = ((problem.products.double() - products) / size).abs().max().item()
        if not worst < 1e-5:
            return f"dot products by {way} differ from the loop's by {worst:.1e} of the norms' product"
        of_sum = sum((problem.sums[key].double() * d.double()).sum() for key, d in problem.direction.items())
        if not (of_sum - products.sum()).abs() < 1e-5 * size.sum():
            return f"the gradient by {way} is not the sum of the loop's"
    return None


def seconds_of(problem: Problem, way: str) -> float:
    clock = time.process_time if problem.device.type == "cpu" else time.perf_counter
    began = clock()
    problem.run(way)
    return clock() - began


def test_all_ways_agree():
    reason = disagreement(Problem("DiT-S/8", 4))
    assert reason is None, reason


def test_report(capsys, pytestconfig):
    if not pytestconfig.getoption("benchmark_enable"):
        pytest.skip("timed with --benchmark-enable only")
    problem = Problem("DiT-S/4", 32)
    reason = disagreement(problem)  # and a first run of each
    if reason is not None:
        pytest.fail(f"{reason}; no speed is reported")
    seconds = {way: [] for way in ways()}
    for _ in range(ROUNDS):  # in turn, so that a slower minute is everybody's
        for way in seconds:
            seconds[way].append(seconds_of(problem, way))
    median = {way: statistics.median(values) for way, values in seconds.items()}
    peak = {way: peak_bytes(lambda way=way: problem.run(way), problem.device.type) for way in seconds}
    device = torch.cuda.get_device_name() if problem.device.type == "cuda" else platform.processor() or "CPU"
    parameters = sum(p.numel() for p in problem.parameters.values())
    lines = [
        f"{problem.name} ({parameters / 1e6:.1f}M parameters), 64 tokens, batch {problem.batch}, float32, {device}",
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, median of {ROUNDS}",
        f"{'':>14}  {'seconds':>8} {'spread':>7} {'of a step':>9} {'peak MiB':>9} {'of a step':>9}",
    ]
    step, step_peak = median["training_step"], peak["training_step"]
    for way, values in seconds.items():
        spread = (max(values) - min(values)) / median[way]
        lines.append(
            f"{way:>14}  {median[way]:8.3f} {spread:6.0%} {median[way] / step:9.2f} {peak[way] / 2**20:9.0f} "
            f"{peak[way] / step_peak:9.2f}"
        )
    faster = (f"{median[way] / median['grand']:.2f} times as fast as {way}" for way in ways()[4:])
    lines.append(f"grand is {', '.join(faster)}")
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))
