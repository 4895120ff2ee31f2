"""Peak memory of per-sample gradients against a plain backward's, counted allocation by allocation on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_bytes
from diffprune.models.dit import DiT
from diffprune.per_sample import per_sample_gradients

BATCH = 16


class Decoder(nn.Module):
    """Token table tied to the logits, and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(500, 64), nn.Embedding(32, 64)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(4)))
        self.head = nn.Linear(64, 500, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.table(x) + self.places(torch.arange(x.shape[1]))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1)
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48), nn.LayerNorm(48)) for _ in range(6)
        )
        self.first, self.reentrant = nn.Linear(48, 48), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def dit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = DiT(input_size=16, patch_size=2, hidden_size=64, depth=3, num_heads=4, num_classes=5, learn_sigma=False)
    return model, (torch.randn(BATCH, 4, 16, 16), torch.rand(BATCH), torch.arange(BATCH) % 5)


CASES = {
    "dit": dit,
    "decoder with a tied table": lambda: (Decoder(), (torch.arange(BATCH * 32).view(BATCH, 32) % 500,)),
    "convolutions": lambda: (Residual(), (torch.randn(BATCH, 16, 32, 32),)),
    "checkpointed": lambda: (Checkpointed(False), (torch.randn(BATCH, 64, 48),)),
    "checkpointed, reentrant": lambda: (Checkpointed(True), (torch.randn(BATCH, 64, 48),)),
}


@pytest.mark.parametrize("name", CASES)
def test_peak_memory_is_within_a_fifth_of_a_plain_backwards(name, monkeypatch):
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    monkeypatch.setattr(
        "diffprune.gradient_parts.BLOCK", 2**16
    )  # as small against these models as it is against real ones
    monkeypatch.setattr("diffprune.kernels.cpu.linear_grad_sqnorm.BLOCK", 2**16)
    monkeypatch.setattr("diffprune.kernels.cpu.linear_grad_dot.BLOCK", 2**16)
    direction = {key: torch.ones_like(p) for key, p in model.named_parameters() if p.requires_grad}

    def loss() -> Tensor:
        return model(*inputs).square().flatten(1).sum(dim=1).sum()

    def plain() -> None:
        loss().backward()
        model.zero_grad()

    def scored() -> Tensor:
        with per_sample_gradients(model, direction=direction) as grads:
            loss().backward()
        return grads.sqnorm

    plain(), scored()
    expected, found = peak_bytes(plain), peak_bytes(scored)
    print(f"{name}: {found / expected:.2f} of {expected / 2**20:.1f} MiB")
    assert found <= 1.2 * expected
