"""The flow path against its definition, and the ODE samplers against closed solutions."""

from __future__ import annotations

import math

import pytest
import torch

from diffprune.flow import (
    guided_velocity,
    interpolate,
    sample_ode,
    velocity_error_norm,
    velocity_loss,
    velocity_target,
)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, 4, 7, generator=generator) for _ in range(3)]


def test_the_path_and_its_losses_element_by_element(data):
    x1, x0, velocity = data
    t = torch.tensor([0, 0.25, 0.5, 0.9, 1])
    xt, target = interpolate(x1, x0, t), velocity_target(x1, x0)
    loss, norm = velocity_loss(velocity, target), velocity_error_norm(velocity, target)
    for i in range(5):
        total = 0.0
        for a, b, c, path in zip(*(x[i].flatten().tolist() for x in (x1, x0, velocity, xt)), strict=True):
            assert path == pytest.approx((1 - t[i].item()) * b + t[i].item() * a, abs=1e-6)
            total += (c - (a - b)) ** 2
        assert loss[i].item() == pytest.approx(total / 84, rel=1e-6)
        assert norm[i].item() == pytest.approx(math.sqrt(total), rel=1e-6)
    assert torch.equal(xt[0], x0[0]) and torch.equal(xt[4], x1[4])


def test_the_target_is_the_time_derivative_of_the_path(data):
    x1, x0, _ = (x.double() for x in data)
    t = torch.full((5,), 0.3, dtype=torch.float64)
    slope = (interpolate(x1, x0, t + 1e-4) - interpolate(x1, x0, t - 1e-4)) / 2e-4
    assert torch.allclose(slope, velocity_target(x1, x0), atol=1e-9)


def test_losses_of_half_precision_against_float32_targets_stay_float32(data):
    x1, x0, velocity = data
    assert velocity_loss(velocity.bfloat16(), velocity_target(x1, x0)).dtype == torch.float32


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_straight_flow_is_solved_exactly(data, method, steps):
    x1, x0, _ = (x.double() for x in data)
    got = sample_ode(lambda x, t: velocity_target(x1, x0), x0, steps, method)
    assert torch.allclose(got, x1, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("method", "factor"), [("euler", 2), ("midpoint", 4), ("heun", 4)])
def test_orders_of_convergence(method, factor):
    """dx/dt = a·x + t, x(0) = x0, has x(1) = e^a·(x0 + 1/a²) - (1 + a)/a²: halving the step halves the error, or
    quarters it."""
    a, x0 = -0.7, torch.tensor([[1.5, -2.0]], dtype=torch.float64)
    exact = math.exp(a) * (x0 + 1 / a**2) - (1 + a) / a**2

    def error(steps: int) -> float:
        got = sample_ode(lambda x, t: a * x + t[:, None], x0, steps, method)
        return (got - exact).abs().max().item()

    for steps in (32, 64):
        assert error(steps) / error(2 * steps) == pytest.approx(factor, rel=0.03)


def test_the_solver_visits_each_time_once_per_evaluation():
    seen = []

    def velocity(x, t):
        assert t.shape == (3,) and t.dtype == x.dtype
        seen.append(t[0].item())
        return torch.zeros_like(x)

    sample_ode(velocity, torch.zeros(3, 2, dtype=torch.float64), 4, "euler")
    assert seen == [0, 0.25, 0.5, 0.75]
    seen.clear()
    sample_ode(velocity, torch.zeros(3, 2, dtype=torch.float64), 2, "heun")
    assert seen == [0, 0.5, 0.5, 1]
    seen.clear()
    sample_ode(velocity, torch.zeros(3, 2, dtype=torch.float64), 2, "midpoint")
    assert seen == [0, 0.25, 0.5, 0.75]
    seen.clear()
    sample_ode(velocity, torch.zeros(3, 2, dtype=torch.float64), 2, "heun", start=0.5, end=0.75)
    assert seen == [0.5, 0.625, 0.625, 0.75]


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_two_parts_of_the_way_are_the_way(data, method):
    x0 = data[0].double()

    def velocity(x, t):
        return x.sin() + t.view(-1, 1, 1, 1)

    half = sample_ode(velocity, x0, 3, method, end=0.75)
    both = sample_ode(velocity, half, 1, method, start=0.75)
    assert torch.allclose(both, sample_ode(velocity, x0, 4, method), rtol=0, atol=1e-14)


class Recorder:
    """A model whose velocity is its label, on all channels; counts its calls and rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, labels):
        assert len(x) == len(t)
        self.rows.append(len(x))
        return labels[:, None, None, None].to(x).expand_as(x) * t[:, None, None, None]


def test_guidance_extrapolates_from_the_null_label_on_all_channels(data):
    model, labels, t = Recorder(), torch.tensor([0, 1, 2, 3, 4]), torch.linspace(0.1, 1, 5)
    got = guided_velocity(model, data[0], t, labels, 4.0, null_label=10)
    expected = (10 + 4.0 * (labels - 10)) * t
    assert torch.allclose(got, expected[:, None, None, None].expand_as(got)) and model.rows == [10]


def test_guidance_of_the_first_channels_leaves_the_labels_velocity_in_the_others(data):
    labels, t = torch.tensor([0, 1, 2, 3, 4]), torch.linspace(0.1, 1, 5)
    got = guided_velocity(Recorder(), data[0], t, labels, 4.0, null_label=10, channels=2)
    assert torch.allclose(got[:, :2], ((10 + 4.0 * (labels - 10)) * t)[:, None, None, None].expand(5, 2, 4, 7))
    assert torch.allclose(got[:, 2:], (labels * t)[:, None, None, None].expand(5, 1, 4, 7))


def test_guidance_scale_one_does_no_second_evaluation(data):
    model, labels = Recorder(), torch.tensor([0, 1, 2, 3, 4])
    got = guided_velocity(model, data[0], torch.ones(5), labels, 1.0, null_label=10)
    assert torch.equal(got[:, 0, 0, 0], labels.float()) and model.rows == [5]


def test_guidance_without_labels_is_refused(data):
    with pytest.raises(ValueError, match="needs labels and a null label"):
        guided_velocity(Recorder(), data[0], torch.ones(5), None, 2.0, 10)
    with pytest.raises(ValueError, match="needs labels and a null label"):
        guided_velocity(Recorder(), data[0], torch.ones(5), torch.zeros(5).long(), 2.0, None)


def test_shapes_and_names_are_checked(data):
    x1, x0, _ = data
    with pytest.raises(ValueError, match=r"one shape, got \(5, 3, 4, 7\) and \(5, 3, 4\)"):
        velocity_target(x1, x0[..., 0])
    with pytest.raises(ValueError, match=r"t of shape \(5,\), got \(1,\)"):
        interpolate(x1, x0, torch.ones(1))
    with pytest.raises(ValueError, match="steps >= 1"):
        sample_ode(lambda x, t: x, x0, 0)
    with pytest.raises(ValueError, match="'euler', 'midpoint', 'heun', got 'rk4'"):
        sample_ode(lambda x, t: x, x0, 1, "rk4")
    for times in ({"start": 0.5, "end": 0.5}, {"start": -0.1}, {"end": 1.5}):
        with pytest.raises(ValueError, match="0 <= start < end <= 1"):
            sample_ode(lambda x, t: x, x0, 1, **times)
