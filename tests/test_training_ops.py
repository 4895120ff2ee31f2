"""A DiT and its loss on this package's ops are those on PyTorch's, forward and backward, and train the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.checkpoints import load_dit
from diffprune.config import DitConfig, DitRun, TrainConfig, load_config
from diffprune.dit_objective import DitObjective
from diffprune.errors import InputError
from diffprune.flow import interpolate, velocity_loss, velocity_target
from diffprune.kernels import dispatch
from diffprune.kernels.philox import normal_noise
from diffprune.learner import Learner
from diffprune.models import ops
from diffprune.ranks import Ranks
from diffprune.training_order import step_generator

MODEL = DitConfig(input_size=4, in_channels=3, hidden_size=24, depth=2, num_heads=3, num_classes=5, learn_sigma=True)
FORWARD = {"attention", "adaln_modulate", "gated_residual", "gated_residual_adaln", "flow_interpolate"}
FORWARD |= {"flow_matching_loss"}
BACKWARD = {"attention_backward", "adaln_modulate_backward", "gated_residual_backward"}
BACKWARD |= {"gated_residual_adaln_backward", "flow_matching_loss_grad"}


class Seen:
    """The names of a DiT's ops that run in the block, inside compiled code too."""

    def __enter__(self) -> Seen:
        self.names, real = set(), dispatch.Op.choose

        def choose(op, *args):
            self.names |= {op.name} & (FORWARD | BACKWARD)
            return real(op, *args)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(dispatch.Op, "choose", choose)
        return self

    def __exit__(self, *_) -> None:
        self.patch.undo()


def objective(form: str, model: DitConfig = MODEL, **train) -> DitObjective:
    """In float64, every weight at work."""
    values = np.random.default_rng(0).standard_normal((20, 3, 4, 4)).astype(np.float16)
    labels = torch.arange(20) % 5
    config = TrainConfig(**{"ops": form, "noise": "counter", "batch_size": 7, "device": "cpu", **train})
    keys = [f"key-{i}" for i in range(20)]
    made = DitObjective(DitRun(model, config), Ranks(), torch.device("cpu"), keys, values, None, labels, {})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    made.model.double()
    return made


def drawn(made: DitObjective, count: int = 7) -> list[torch.Tensor]:
    inputs = made.draw(torch.arange(count) * 2, slice(0, count), step_generator(0, "step", 4))
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]


def loss_and_gradients(made: DitObjective, run=None) -> list[torch.Tensor]:
    losses = made.losses(made.model if run is None else run, *drawn(made))
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    return [losses.detach(), *torch.autograd.grad((losses * torch.arange(1, 8)).sum(), parameters)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"qk_norm": True, "rope": True, "num_classes": 5}])
@pytest.mark.parametrize("form", ["diffprune", "reference"])
def test_losses_and_gradients_are_those_of_pytorch(form, more):
    model = replace(MODEL, hidden_size=36, **more) if more else MODEL
    with Seen() as plain:
        expected = loss_and_gradients(objective("torch", model))
    assert not plain.names and all(tensor.abs().max() > 0 for tensor in expected)
    with Seen() as seen:
        found = loss_and_gradients(objective(form, model))
    # "auto" takes PyTorch's attention, see kernels/attention.py.
    missing = {"attention", "attention_backward"} if form == "diffprune" else set()
    assert seen.names == (FORWARD | BACKWARD) - missing
    assert_close(found, expected)


def test_compiled_whole_they_are_the_same():
    expected = loss_and_gradients(objective("torch"))
    made = objective("reference")
    torch._dynamo.reset()
    run = torch.compile(made.model, backend="aot_eager", fullgraph=True)
    with Seen() as seen:
        found = loss_and_gradients(made, run)
    assert seen.names == FORWARD | BACKWARD
    assert_close(found, expected)


def test_a_step_of_the_learner_with_compiled_blocks_runs_on_them(monkeypatch):
    """All but the compiler's last stage."""
    from diffprune.models.dit import DiT

    real = DiT.compile_blocks
    monkeypatch.setattr(DiT, "compile_blocks", lambda self: real(self, "aot_eager"))
    torch._dynamo.reset()
    results = []
    for form, compiled in (("torch", False), ("reference", True)):
        made = objective(form, compile=compiled, lr=1e-3)
        made.model.float()
        learner = Learner(made, made.train, bfloat16=False)
        with Seen() as seen:
            results.append([learner.step(learner.draw(step))[0] for step in range(3)])
        assert bool(seen.names) == compiled
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_counter_noise_is_the_counters_and_stays_when_the_form_changes():
    made, form = objective("torch"), objective("reference")
    x1, hashes, t, labels = drawn(made)
    assert hashes.dtype == torch.int64 and len(hashes.unique()) == 7
    assert torch.equal(drawn(form)[1], hashes)
    x0 = normal_noise(hashes, 0, 0, 48).view(7, 3, 4, 4).double()
    velocity = made.model(interpolate(x1, x0, t), t, labels)
    expected = velocity_loss(velocity, velocity_target(x1, x0))
    for one in (made, form):
        torch.testing.assert_close(one.losses(one.model, x1, hashes, t, labels), expected, rtol=1e-12, atol=0)
    other = objective("torch", seed=1)
    assert not torch.allclose(other.losses(made.model, x1, hashes, t, labels), expected)


def train(small_run, out: Path, *overrides: str) -> dict[str, torch.Tensor]:
    every = ["model.input_size=4", "model.hidden_size=16", "model.depth=1", "train.batch_size=7", "train.device=cpu"]
    config = load_config(None, "dit", [*every, "train.steps=4", *overrides])
    report = diffprune.train_dit(config, small_run.latents, out)
    return load_file(Path(report["checkpoint"]) / "model.safetensors")


@pytest.mark.parametrize("noise", ["generator", "counter"])
def test_runs_of_both_forms_end_the_same_and_go_on_from_each_other(small_run, tmp_path, noise):
    noise = f"train.noise={noise}"
    plain = train(small_run, tmp_path / "plain", noise, "train.ops=torch")
    ours = train(small_run, tmp_path / "ours", noise, "train.ops=diffprune")
    train(small_run, tmp_path / "mixed", noise, "train.ops=reference", "train.steps=2")
    mixed = train(small_run, tmp_path / "mixed", noise, "train.ops=torch")
    for found in (ours, mixed):
        for name, expected in plain.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=2e-5, msg=name)
    default = train(small_run, tmp_path / "default", noise)  # auto is PyTorch's form today
    assert all(torch.equal(default[name], tensor) for name, tensor in plain.items())


def test_a_run_on_the_ops_is_scored(small_run, tmp_path):
    """Whatever form it was trained in, a checkpoint is loaded in PyTorch's, and per-sample rules see either."""
    train(small_run, tmp_path / "run", "train.ops=reference", "train.noise=counter", "train.lr=0.01")
    model, _ = load_dit(tmp_path / "run", "model")
    assert model.blocks[0].impl is None
    diffprune.score(small_run.latents, tmp_path / "run", tmp_path / "scores", methods=("grand", "loss"))
    latents = torch.from_numpy(ArrayFolder(small_run.latents).load()[1][:5]).double()
    generator = torch.Generator().manual_seed(3)
    model = model.double()
    x0, t = torch.randn(latents.shape, generator=generator).double(), torch.rand(5, generator=generator).double()
    found = {}
    for impl in (None, "auto", "reference"):
        model.use_ops(impl)
        with diffprune.per_sample_gradients(model) as grads, Seen() as seen:
            velocity = model(interpolate(latents, x0, t), t, torch.arange(5))
            velocity_loss(velocity, velocity_target(latents, x0)).sum().backward()
        assert bool(seen.names) == (impl is not None)
        found[impl] = grads.sqnorm
    model.use_ops("reference")
    for row in range(5):
        one = slice(row, row + 1)
        velocity = model(interpolate(latents[one], x0[one], t[one]), t[one], torch.tensor([row]))
        loss = velocity_loss(velocity, velocity_target(latents[one], x0[one])).sum()
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        expected = sum(g.square().sum() for g in gradients)
        for norms in found.values():
            torch.testing.assert_close(norms[row], expected, rtol=1e-9, atol=0)


def test_auto_goes_by_what_was_measured(monkeypatch):
    assert ops.choose_ops("auto", "cpu") is None and ops.choose_ops("auto", "cuda") is None
    assert ops.choose_ops("torch", "cpu") is None and ops.choose_ops("diffprune", "cpu") == "auto"
    monkeypatch.setitem(ops.FASTER, "cuda", "triton")
    assert ops.choose_ops("auto", "cuda") is None  # no GPU has confirmed it
    monkeypatch.setattr(ops, "UNCONFIRMED", frozenset())
    monkeypatch.setattr(ops, "report", lambda: {op: {"triton": None} for op in ops.OPS})
    assert ops.choose_ops("auto", "cuda") == "triton"


def test_an_implementation_that_cannot_run_here_is_told(monkeypatch):
    reasons = {op: {"triton": None, "reference": None} for op in ops.OPS}
    reasons["gated_residual"]["triton"] = "needs a GPU"
    monkeypatch.setattr(ops, "report", lambda: reasons)
    with pytest.raises(InputError, match=r"train.ops: 'triton' cannot run here: gated_residual: needs a GPU; "):
        objective("triton")
    with pytest.raises(InputError, match=r"train.ops: expected .*'triton', found 'cuda'"):
        load_config(None, "dit", ["train.ops=cuda"])
    for override in ("ops=reference", "noise=counter", "sharding=fsdp", "sample_every=4"):
        with pytest.raises(InputError, match=f"train.{override.partition('=')[0]}: is a DiT's"):
            load_config(None, "vqvae", [f"train.{override}"])
