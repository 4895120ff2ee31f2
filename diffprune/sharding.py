"""A model over several processes: whole in each (DDP), or a part of every weight in each (FSDP2)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from diffprune.ranks import Ranks


def wrapped(model: nn.Module, ranks: Ranks, sharding: str) -> nn.Module:
    """The model, its gradients averaged over the processes as they come up from the backward pass.

    With "fsdp" the model's own parameters become ``DTensor`` and hold this process's rows alone; a block's are gathered
    when it is run and forgotten after it.
    """
    if ranks.size == 1:
        return model
    if sharding == "fsdp":
        from torch.distributed.fsdp import fully_shard

        device = next(model.parameters()).device.type
        mesh = distributed.init_device_mesh(device, (ranks.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    # Buffers are not sent around: every process computes the same ones.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    return DistributedDataParallel(model, **{option: False}, gradient_as_bucket_view=True)


def without_sync(model: nn.Module, last: bool) -> nullcontext:
    """Around a part of a batch that is not the last: its gradients are added up here and sent with the last one's."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return hasattr(tensor, "full_tensor")


def own(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each, in its memory; all of one that is not sharded."""
    return [t.detach().to_local() if is_sharded(t) else t.detach() for t in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of it; every process has to ask for it where it is sharded."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def fill(target: Tensor, values: Tensor) -> None:
    """Write ``values``, which every process has whole, into a tensor that may be sharded."""
    if not is_sharded(target):
        target.detach().copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(values.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.detach().to_local().copy_(part.to_local())


def full_norm(norm: Tensor) -> Tensor:
    """The norm of all parts, from what ``get_total_norm`` returns."""
    return norm.full_tensor() if is_sharded(norm) else norm


def all_finite(tensors: Iterable[Tensor], ranks: Ranks) -> list[bool]:
    """Of each tensor, whether all of it is finite; the same answer in every process."""
    norms = torch.stack(torch._foreach_norm(own(tensors)))
    return ranks.gathered(norms[None]).isfinite().all(dim=0).tolist()
