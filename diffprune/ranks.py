"""The processes that train one model together: started by torchrun, one a device, or a single one without it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from diffprune.device import pick_device
from diffprune.errors import InputError
from diffprune.rank_talk import environment_number, join

_TOLD_BYTES = 64 << 20  # at a time


@dataclass(frozen=True)
class Ranks:
    """This process among ``size``; rank 0 writes what there is to write."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> slice:
        """This process's part of a batch of ``count`` rows, as many as everyone's."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gathered(self, values: Tensor) -> Tensor:
        """Everyone's ``values`` [b, ...], of one shape, in the order of ranks: [b * size, ...]."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def gathered_objects(self, value: Any) -> list[Any]:
        """Everyone's ``value``, plain Python objects, in the order of ranks."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            distributed.all_gather_object(values, value)
        return values

    def tell(self, values: Tensor, rank: int) -> None:
        """That process's ``values`` [n, ...], on the CPU, into everyone's, which are of its shape and dtype."""
        if self.size == 1 or not len(values):
            return
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        for block in values.split(max(1, _TOLD_BYTES * len(values) // values.nbytes)):
            told = block.to(device)
            distributed.broadcast(told, rank)
            block.copy_(told)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the mean of everyone's."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)
                tensor /= self.size

    def wait(self) -> None:
        """Until everyone is here."""
        if self.size > 1:
            distributed.barrier()


def training_ranks(device: str, batch_size: int) -> tuple[Ranks, torch.device]:
    """The processes of this run, and this one's device: with torchrun and device auto, the GPU of its local rank.

    They talk through NCCL on GPUs and gloo on CPUs. A process group that is there already is used. One made here stays
    until the process ends: torchrun's store still knows its addresses, so that a second one would never meet.

    Raises: InputError where ``batch_size`` is no multiple of the number of processes.
    """
    launched = distributed.is_available() and (distributed.is_initialized() or "WORLD_SIZE" in os.environ)
    size = (
        distributed.get_world_size()
        if launched and distributed.is_initialized()
        else environment_number("WORLD_SIZE", 1)
    )
    if not launched or size == 1:
        return Ranks(), pick_device(device)
    if batch_size % size:
        raise InputError(f"train.batch_size: expected a multiple of the {size} processes, got {batch_size}")
    chosen = pick_device(local_device(device))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not distributed.is_initialized():
        # With patience: while the first process writes a checkpoint to slow storage, the others wait in their next sum.
        join("nccl" if chosen.type == "cuda" else "gloo")
    return Ranks(distributed.get_rank(), size), chosen


def local_device(device: str) -> str:
    """``device``, or for auto and cuda under torchrun the GPU of this process."""
    several = device in ("auto", "cuda") and "WORLD_SIZE" in os.environ and torch.cuda.is_available()
    return f"cuda:{environment_number('LOCAL_RANK', 0)}" if several else device
