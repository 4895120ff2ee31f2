"""Which form a DiT's attention, adaLN chain and loss have: PyTorch's own, or this package's ops. Decided here alone."""

from __future__ import annotations

import torch

from diffprune.errors import InputError
from diffprune.kernels import report
from diffprune.kernels.dispatch import UNCONFIRMED

TORCH = "torch"
OPS = ("attention", "adaln_modulate", "gated_residual", "gated_residual_adaln")
OPS += ("flow_interpolate", "flow_matching_loss", "flow_matching_loss_grad")
"""What a DiT and its loss are made of."""

FASTER = {
    # benchmarks/bench_training.py: in a step of DiT-S/4 the ops save nothing over PyTorch's own forms, and what
    # torch.compile fuses around them it cannot fuse across them.
    "cpu": TORCH,
    # benchmarks/gpu_cases_training.py measures Triton's; until a GPU has run it, no figure says that they are faster.
    "cuda": TORCH,
}
"""The form that measured faster, by type of device: "torch", or the implementation of the ops to ask for."""


def choose_ops(asked: str, device: torch.device | str) -> str | None:
    """The ``impl`` that the ops are called with, or None for PyTorch's own forms.

    Args:
        asked: "auto" for what measured faster on this type of device; "torch"; "diffprune" for the ops, each with the
            implementation that its dispatcher takes; or an implementation's name ("reference", "triton").

    Raises: InputError for an implementation that cannot run on this machine; it says why.
    """
    if asked == "auto":
        asked = FASTER.get(torch.device(device).type, TORCH)
        if asked in UNCONFIRMED:
            asked = TORCH
    if asked in (TORCH, "diffprune"):
        return None if asked == TORCH else "auto"
    reasons = report()
    for op in OPS:
        reason = reasons[op].get(asked, "there is none")
        if reason is not None:
            raise InputError(f"train.ops: {asked!r} cannot run here: {op}: {reason}; take auto, torch or diffprune")
    return asked
