"""Per-sample gradients of real parameters that meet complex tensors, against autograd."""

from __future__ import annotations

import pytest
import torch
from model_gradients import check, drawn_anew, sample_gradients, weighted_losses
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # an imaginary part that is dropped unseen

B, T, D = 3, 5, 4


class Model(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.real, self.pair, self.matrix = (nn.Parameter(torch.zeros(*s)) for s in ((D,), (D, 2), (D, D, 2)))
        self.kernel, self.grid = nn.Parameter(torch.zeros(2, T, 2, 2)), nn.Parameter(torch.zeros(3, D, 2))
        self.function = function

    @property
    def filter(self):
        return torch.view_as_complex(self.pair)

    @property
    def weight(self):
        return torch.view_as_complex(self.matrix)

    def forward(self, x):
        z = self.function(self, torch.fft.fft(x))
        return torch.view_as_real(z) if z.is_complex() else z


CASES = {
    "a real filter": lambda m, z: z * m.real,
    "a real filter, back to real": lambda m, z: torch.fft.irfft(z * m.real, n=6),
    "a complex filter": lambda m, z: z * m.filter,
    "a complex filter from two parts": lambda m, z: z * torch.complex(m.real, m.pair[:, 0]),
    "a real filter cast": lambda m, z: z * m.real.to(z.dtype),
    "a filter on a grid": lambda m, z: torch.fft.fft(z, dim=1)[:, :3] * torch.view_as_complex(m.grid),
    "added": lambda m, z: (z + m.filter) * (m.real - z),
    "added with a complex factor": lambda m, z: torch.add(z, m.filter, alpha=2 - 3j).square(),
    "divided": lambda m, z: z / m.filter,
    "divided by a real weight": lambda m, z: z / m.real,
    "divides": lambda m, z: m.filter / (3 + z),
    "a real weight divided": lambda m, z: m.real / (3 + z),
    "chosen": lambda m, z: torch.where(z.real > 0, z, m.filter).square(),
    "put beside": lambda m, z: torch.cat([z, m.filter.expand(len(z), 1, -1)], dim=1).square(),
    "linear": lambda m, z: F.linear(z, m.weight),
    "linear, transposed": lambda m, z: F.linear(z, m.weight.T, m.filter),
    "matmul": lambda m, z: z @ m.weight,
    "matmul from the left": lambda m, z: m.weight @ z.mT,
    "addmm": lambda m, z: torch.addmm(m.filter, z[:, 0], m.weight),
    "convolution": lambda m, z: F.conv1d(z, torch.view_as_complex(m.kernel)),
    "transposed convolution": lambda m, z: F.conv_transpose1d(z, torch.view_as_complex(m.kernel.transpose(0, 1))),
    "polar rotations": lambda m, z: z * torch.polar(torch.ones(T, D).double(), torch.arange(T)[:, None] * m.real),
    "a rotated embedding": lambda m, z: z * F.embedding(torch.arange(T) % D, m.matrix[..., 0]).exp(),
    "a kernel of a state space": lambda m, z: torch.fft.irfft(
        torch.fft.rfft(z.real, n=2 * T, dim=1) * torch.fft.rfft(s4d(m), n=2 * T, dim=0), n=2 * T, dim=1
    )[:, :T],
}


def s4d(model):
    rates = torch.complex(-model.real.exp(), model.pair[:, 0])
    return (torch.exp(rates * torch.arange(T)[:, None]) * model.filter).real


@pytest.mark.parametrize("name", CASES)
def test_equals_autograd(name):
    model = drawn_anew(Model(CASES[name]))
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check(weighted_losses, model, x, sample_gradients(weighted_losses, model, x.split(1)))
