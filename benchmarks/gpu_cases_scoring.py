"""Cases of whole scoring passes: GraNd and MoSo with DiT-XL/2 and B/2 on latents of 256-pixel images, in bfloat16.

Each is what `score` does with a batch that lies on the device, beside a plain training step's forward and backward, and
beside other ways to the same norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_case import Case, Goal, Scale, Way, normal, relative_error
from benchmarks.gpu_cases_training import dit_config, lively, step_counts
from diffprune.config import DitConfig
from diffprune.kernels import dispatch, report
from diffprune.memory import BatchSize
from diffprune.per_sample import per_sample_gradients
from diffprune.scores.batches import Draws, Network, Samples, draw_losses
from diffprune.scores.moso import gradient_sum
from diffprune.scores.visit import visit

BATCHES = {"DiT-XL/2": 64, "DiT-B/2": 256}
AT_ONCE = {"DiT-XL/2": 4, "DiT-B/2": 16}
"""Samples whose gradients vmap(grad) writes out at a time: 11 and 8 GB."""
DRAWS = Draws(0, 1)
ROWS = 3
"""Samples whose scores are compared with float32 autograd's, one at a time."""
TOLERANCE = 5e-2
"""Of norms, and of dot products relative to both norms: bfloat16's rounding."""
STEP = "training step"


class Scoring:
    """A model with weights like a trained one's, and the mean gradient that MoSo's second pass is given."""

    def __init__(self, config: DitConfig, device: torch.device) -> None:
        self.model = lively(config, device)
        self.network = Network(self.model, bf16=device.type == "cuda")
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        generator = torch.Generator(device).manual_seed(1)
        self.direction = {
            name: 1e-3 * torch.randn(p.shape, generator=generator, device=device) for name, p in self.parameters.items()
        }

    def step(self, *inputs: Tensor) -> None:
        """Forward and backward of training, with no optimizer."""
        for parameter in self.parameters.values():
            parameter.grad = None
        draw_losses(self.network, samples_of(*inputs), DRAWS)[0].mean().backward()

    def grand(self, *inputs: Tensor) -> dict[str, Tensor]:
        samples = samples_of(*inputs)
        return visit(self.network, samples, DRAWS, BatchSize(len(samples)), norms=True)

    def one_pass(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Norms, dot products and the batch's gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None
        with per_sample_gradients(self.model, direction=self.direction, weight_gradients=True) as grads:
            draw_losses(self.network, samples_of(*inputs), DRAWS)[0].sum().backward()
        return {"grand": grads.sqnorm.sqrt(), "dot": grads.dot}

    def moso(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Both passes. The second one's direction is another one, so that it can be checked."""
        samples = samples_of(*inputs)
        size = BatchSize(len(samples))
        gradient_sum(self.network, samples, DRAWS, size)
        found = visit(self.network, samples, DRAWS, size, norms=True, direction=self.direction)
        return {"grand": found["grand"], "dot": found["dot"]}

    def loop(self, *inputs: Tensor) -> dict[str, Tensor]:
        """One image at a time, as published code has it."""
        samples, norms = samples_of(*inputs), []
        for row in range(len(samples)):
            loss = draw_losses(self.network, samples.take(torch.tensor([row], device=samples.hashes.device)), DRAWS)[0]
            gradients = torch.autograd.grad(loss.sum(), list(self.parameters.values()))
            norms.append(torch.stack(torch._foreach_norm(gradients)).norm())
        return {"grand": torch.stack(norms)}

    def vmap(self, at_once: int, *inputs: Tensor) -> dict[str, Tensor]:
        """`torch.func`: every sample's gradient, a few samples at a time."""
        frozen = {key: p for key, p in self.model.named_parameters() if not p.requires_grad}

        def loss(parameters: dict[str, Tensor], x1: Tensor, x0: Tensor, t: Tensor, label: Tensor) -> Tensor:
            network = Network(lambda *given: functional_call(self.model, (parameters, frozen), given),
                              bf16=self.network.bf16)  # fmt: skip
            return network.losses_and_norms(x1[None], x0[None], t[None], label[None])[0].sum()

        x1, hashes, labels = inputs
        t, x0 = DRAWS.pair(hashes, 0, x1.shape[1:])
        parameters = {key: p.detach() for key, p in self.parameters.items()}
        norms = []
        for rows in torch.arange(len(x1), device=x1.device).split(at_once):
            given = (x1[rows], x0[rows], t[rows], labels[rows])
            with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule, and run sample by sample
                gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, *given)
            norms.append(torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0))
        return {"grand": torch.cat(norms)}

    def opacus(self, *inputs: Tensor) -> dict[str, Tensor]:
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

        self.model.train()
        hooked = GradSampleModuleFastGradientClipping(
            self.model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum", strict=False
        )
        try:
            network = Network(hooked, bf16=self.network.bf16)
            draw_losses(network, samples_of(*inputs), DRAWS)[0].sum().backward()
            return {"grand": hooked.get_norm_sample()}
        finally:
            hooked.to_standard_module()
            self.model.eval()

    def check(self, inputs: tuple, output: dict[str, Tensor]) -> float:
        """The largest error of the first few samples, against float32 autograd, one at a time."""
        network, samples = Network(self.model), samples_of(*inputs)
        size = torch.stack(torch._foreach_norm(list(self.direction.values()))).norm()
        errors = []
        for row in range(min(ROWS, len(samples))):
            one = samples.take(torch.tensor([row], device=samples.hashes.device))
            loss = draw_losses(network, one, DRAWS)[0].sum()
            gradients = torch.autograd.grad(loss, list(self.parameters.values()))
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            errors.append(relative_error(output["grand"].flatten()[row], norm))
            if "dot" in output:
                dot = sum((g * d).sum() for g, d in zip(gradients, self.direction.values(), strict=True))
                errors.append(float((output["dot"][row] - dot).abs() / (norm * size)))
        return max(errors) if output["grand"].isfinite().all() else inf


def samples_of(x1: Tensor, hashes: Tensor, labels: Tensor) -> Samples:
    return Samples(hashes, x1, labels)


@lru_cache(maxsize=1)  # two models' weights, directions and gradients may not fit
def scoring(name: str, scale: Scale) -> Scoring:
    return Scoring(dit_config(name, scale.quick), scale.device)


def scoring_cases(name: str, scale: Scale) -> Iterator[Case]:
    """One model's passes, each against a training step, and GraNd's against other ways to the norms."""
    config = dit_config(name, scale.quick)
    batch = scale.size(BATCHES[name], 3)
    at_once = scale.size(AT_ONCE[name], 2)
    step, parameters = step_counts(config)

    def make(generator: torch.Generator) -> tuple:
        shape = (config.in_channels, config.input_size, config.input_size)
        hashes = torch.randint(2**62, (batch,), generator=generator, device=generator.device)
        labels = torch.randint(config.num_classes, (batch,), generator=generator, device=generator.device)
        return normal(generator, batch, *shape, dtype=torch.float32), hashes, labels

    def way(label: str, call: Callable[..., Any], missing: str | None = None) -> Way:
        run = lambda *inputs: call(scoring(name, scale), *inputs)  # noqa: E731
        return Way(label, run, False, _check(name, scale), TOLERANCE, missing)

    def ways(call: Callable[..., Any], others: Callable[[], list[Way]]) -> list[Way]:
        plain = Way(STEP, lambda *inputs: scoring(name, scale).step(*inputs))
        own = [
            Way(impl, partial(_with, impl, call, name, scale), True, _check(name, scale), TOLERANCE, reason)
            for impl, reason in _implementations(scale).items()
        ]
        return [*own, plain, *others()]

    def other_norms() -> list[Way]:
        missing = None if find_spec("opacus") else "needs the package opacus"
        return [
            way("one image at a time", Scoring.loop),
            way("vmap(grad)", lambda problem, *inputs: problem.vmap(at_once, *inputs)),
            way("Opacus' ghost norms", Scoring.opacus, missing),
        ]

    shape = {"images": batch, "T": (config.input_size // config.patch_size) ** 2, "D": config.hidden_size}
    of_step = lambda share: Goal(f"{share} of a training step's time", "faster", 1 / share, (STEP,))  # noqa: E731
    grand_goals = (
        of_step(0.85),
        Goal("40 times one image at a time", "faster", 40.0, ("one image at a time",)),
        Goal("2 times vmap and Opacus", "faster", 2.0, ("vmap(grad)", "Opacus")),
    )
    # A step's three parts, forward, input gradients and weight gradients, take equally many operations.
    for label, call, others, goals, parts in (
        ("GraNd", Scoring.grand, other_norms, grand_goals, 2),
        ("norms, dot products and the gradient in one pass", Scoring.one_pass, list, (of_step(1.4),), 3),
        ("MoSo, two passes", Scoring.moso, list, (of_step(2.2),), 5),
    ):
        moved = parts * 2 * parameters  # the weights in bfloat16, once for each part
        yield Case(
            scoring_op(name), f"{name}, {label}", shape, "bfloat16", make, partial(ways, call, others), moved,
            batch * step * parts // 3, goals,
        )  # fmt: skip


def scoring_op(name: str) -> str:
    """What the command line calls a model's cases: score_dit_xl2."""
    return "score_" + name.lower().replace("-", "_").replace("/", "")


SCORING: dict[str, Callable[[Scale], Iterator[Case]]] = {
    scoring_op(name): partial(scoring_cases, name) for name in BATCHES
}


def _check(name: str, scale: Scale) -> Callable[[tuple, Any], float]:
    return lambda inputs, output: scoring(name, scale).check(inputs, output)


def _implementations(scale: Scale) -> dict[str, str | None]:
    """Of the ops of per-sample gradients: None, or why they cannot run here. On a CPU what runs there."""
    if scale.device.type != "cuda":
        return {"cpu": None}
    reasons = report()["linear_grad_sqnorm"]
    return {name: reasons[name] for name in scale.implementations}


def _with(impl: str, call: Callable[..., Any], name: str, scale: Scale, *inputs: Tensor) -> Any:
    with _confirmed(impl):
        return call(scoring(name, scale), *inputs)


@contextmanager
def _confirmed(impl: str) -> Iterator[None]:
    """``impl="auto"`` takes this one before all others, and no other of those that no GPU has confirmed."""
    before = dispatch.UNCONFIRMED
    dispatch.UNCONFIRMED = before - {impl}
    try:
        yield
    finally:
        dispatch.UNCONFIRMED = before
