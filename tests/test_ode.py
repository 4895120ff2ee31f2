"""dopri5 against closed solutions and scipy, and its promise: a sample's steps are its own."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from diffprune.errors import DiffpruneError
from diffprune.ode import _ERROR, _STAGES, _TIMES, solve_adaptive


def test_the_pair_satisfies_its_order_conditions():
    """Rows sum to their times, Σ b·c^k = 1/(k+1) up to order 5, and the error weights cancel up to order 4."""
    times = (0.0, *_TIMES)
    for time, row in zip(_TIMES, _STAGES, strict=True):
        assert sum(row) == pytest.approx(time, abs=1e-14)
    for k in range(5):
        fifth = sum(b * c**k for b, c in zip((*_STAGES[-1], 0.0), times, strict=True))
        error = sum(e * c**k for e, c in zip(_ERROR, times, strict=True))
        assert fifth == pytest.approx(1 / (k + 1), abs=1e-14)
        assert error == pytest.approx(0, abs=1e-14) if k < 4 else abs(error) > 1e-4


def nonlinear(x: torch.Tensor, t: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
    """Stiffer where the first element is larger, so that samples want different steps."""
    return torch.sin(3 * t[:, None] + x) * (1 + 8 * x[:, :1].square())


@pytest.mark.parametrize("rtol", [1e-3, 1e-8])
def test_agrees_with_scipy_sample_by_sample(rtol):
    x0 = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = solve_adaptive(nonlinear, x0, rtol=rtol, atol=rtol / 10)
    for row in range(6):
        exact = solve_ivp(
            lambda t, x: nonlinear(torch.from_numpy(x)[None], torch.tensor([t]))[0].numpy(),
            (0, 1),
            x0[row].numpy(),
            method="DOP853",
            rtol=1e-12,
            atol=1e-12,
        ).y[:, -1]
        assert found.x[row].numpy() == pytest.approx(exact, rel=50 * rtol, abs=50 * rtol)
    assert len(set(found.evaluations.tolist())) > 1  # they did take different steps


def test_a_sample_is_the_same_to_the_bit_in_any_batch():
    x0 = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    together = solve_adaptive(nonlinear, x0)
    for rows in ([3], [6, 3, 0], [1, 2, 3, 4, 5]):
        apart = solve_adaptive(nonlinear, x0[rows])
        assert torch.equal(apart.x, together.x[rows]) and torch.equal(apart.evaluations, together.evaluations[rows])


def test_parts_of_the_way_a_shape_and_a_flow_that_needs_no_steps():
    x0 = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = x0 * math.exp(-0.7 * 0.25)
    found = solve_adaptive(lambda x, t, _: -0.7 * x, x0, rtol=1e-10, atol=1e-10, start=0.5, end=0.75)
    assert torch.allclose(found.x, exact, rtol=1e-9)
    straight = solve_adaptive(lambda x, t, _: torch.ones_like(x), x0)
    assert torch.allclose(straight.x, x0 + 1, atol=1e-12) and straight.evaluations.max() < 40
    still = solve_adaptive(lambda x, t, _: torch.zeros_like(x), torch.zeros(2, 3))
    assert torch.equal(still.x, torch.zeros(2, 3))
    assert solve_adaptive(lambda x, t, _: x, x0[:0]).x.shape == (0, 3, 4, 5)


def test_evaluations_are_counted_and_rows_are_told():
    calls = []

    def velocity(x, t, rows):
        assert torch.equal(x[:, 0], labels[rows])  # that never changes
        calls.append(len(x))
        return nonlinear(x, t) * torch.tensor([0.0, 1, 1])

    x0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    labels = x0[:, 0]
    found = solve_adaptive(velocity, x0)
    assert found.evaluations.sum() == sum(calls) and min(calls) < 4


def test_tighter_tolerances_err_less_and_cost_more():
    x0 = torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    exact = solve_adaptive(nonlinear, x0, rtol=1e-12, atol=1e-12).x
    loose, tight = (solve_adaptive(nonlinear, x0, rtol=r, atol=r) for r in (1e-3, 1e-7))
    assert (tight.x - exact).abs().max() < 1e-6 < (loose.x - exact).abs().max() < 1e-1
    assert (tight.evaluations > loose.evaluations).all()


def test_a_sample_whose_velocity_is_not_finite_is_nan_and_the_others_go_on():
    def velocity(x, t, _):
        return torch.where((x[:, :1] > 5) & (t[:, None] > 0.5), torch.nan, torch.ones_like(x))

    found = solve_adaptive(velocity, torch.tensor([[0.0, 1.0], [9.0, 1.0]]))
    assert torch.allclose(found.x[0], torch.tensor([1.0, 2.0])) and found.x[1].isnan().all()
    assert solve_adaptive(lambda x, t, _: x * torch.nan, torch.ones(2, 2)).x.isnan().all()


def test_what_cannot_be_solved_is_said():
    with pytest.raises(DiffpruneError, match="1 of 2 samples have not arrived after 1,000 steps"):
        solve_adaptive(lambda x, t, _: 1e5 * x * torch.cos(1e5 * t[:, None]), torch.tensor([[1.0], [0.0]]).double())
    for options in ({"rtol": -1.0}, {"atol": 0.0}, {"start": 1.0}, {"end": 2.0}):
        with pytest.raises(ValueError, match="expected"):
            solve_adaptive(lambda x, t, _: x, torch.ones(1, 1), **options)
