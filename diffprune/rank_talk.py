"""The processes of a stage that torchrun started, each with a share of the shards, and what they tell each other.

All that is summed is summed exactly or in shard order, so results do not depend on how many there are.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from diffprune.errors import DiffpruneError, InputError

if TYPE_CHECKING:
    from torch import Tensor

Made = TypeVar("Made")

PATIENCE = timedelta(days=20)  # for each other's shards, in 31 bits of milliseconds; where one dies, torchrun ends all


@dataclass(frozen=True)
class RankTalk:
    """This process, number ``rank`` of ``size``. Every method is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    group: Any = None  # of torch.distributed

    @classmethod
    def of_torchrun(cls) -> RankTalk:
        """The processes that torchrun started with this one; without it, this one alone. They talk through gloo.

        A GPU is that of the local rank. Raises InputError for an environment that torchrun would not make.
        """
        size, local_rank = environment_number("WORLD_SIZE", 1), environment_number("LOCAL_RANK", 0)
        if size <= 1:
            return ALONE
        import torch
        from torch import distributed

        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        if not distributed.is_initialized():
            join("gloo")
        return cls(distributed.get_rank(), distributed.get_world_size(), _gloo_group())

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier(group=self.group)

    def first(self, values: list[int]) -> list[int]:
        """The first process's numbers; all have as many."""
        if self.size == 1:
            return values
        import torch
        from torch import distributed

        told = torch.tensor(values, dtype=torch.int64)
        distributed.broadcast(told, 0, group=self.group)
        return told.tolist()

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes. Exact for integers, and for float64 where no partial sum rounds."""
        return self._reduced(values, "SUM")

    def count(self, own: int) -> int:
        """The sum of all processes' numbers."""
        if self.size == 1:
            return own
        import torch

        return int(self._reduced(torch.tensor(own), "SUM"))

    def max(self, value: float) -> float:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return value
        import torch

        return float(self._reduced(torch.tensor(value, dtype=torch.float64), "MAX"))

    def together(self, make: Callable[[], Made]) -> Made:
        """What ``make`` gives here, if it gives something to all; an error of one's ends all of them with an error."""
        made, error = None, None
        try:
            made = make()
        except DiffpruneError as caught:
            error = caught
        if self.max(float(error is not None)) and error is None:
            error = DiffpruneError("another process of this run has stopped; its message says why")
        if error is not None:
            raise error
        return made

    def gather(self, rows: Tensor) -> Tensor:
        """Everyone's ``rows`` [n, ...], in the order of ranks: of one dtype, and one shape but for n."""
        if self.size == 1:
            return rows
        import torch
        from torch import distributed

        own = torch.tensor([len(rows)])
        counts = [torch.zeros_like(own) for _ in range(self.size)]
        distributed.all_gather(counts, own, group=self.group)
        most = max(int(count) for count in counts)
        padded = rows.new_zeros(most, *rows.shape[1:], device="cpu")
        padded[: len(rows)] = rows.cpu()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(parts, padded, group=self.group)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)]).to(rows.device)

    def tell(self, rows: Tensor, rank: int) -> Tensor:
        """The ``rows`` [n, ...] of that process, to all; theirs have its dtype, and its shape but for n."""
        if self.size == 1:
            return rows
        import torch
        from torch import distributed

        counts = self.gather(torch.tensor([len(rows)]))
        told = rows.contiguous() if rank == self.rank else rows.new_empty(int(counts[rank]), *rows.shape[1:])
        distributed.broadcast(told, rank, group=self.group)
        return told

    def send(self, values: Tensor) -> None:
        """To the first process, which receives it."""
        from torch import distributed

        distributed.send(values.contiguous(), 0, group=self.group)

    def receive(self, values: Tensor, rank: int) -> Tensor:
        """What that process sends, into ``values``, of the same shape and dtype."""
        from torch import distributed

        distributed.recv(values, rank, group=self.group)
        return values

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        if self.size == 1:
            return values
        from torch import distributed

        result = values.detach().cpu().clone()
        distributed.all_reduce(result, getattr(distributed.ReduceOp, how), group=self.group)
        return result.to(values.device)


ALONE = RankTalk()
_group: Any = None


def _gloo_group() -> Any:
    """The group of all, or one beside it where that talks through NCCL; made once."""
    global _group
    from torch import distributed

    if distributed.get_backend() == "gloo":
        return None
    if _group is None:
        _group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return _group


def environment_number(name: str, default: int) -> int:
    """A variable that torchrun sets; InputError for what is no number."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(f"environment variable {name}: expected a number, as torchrun sets it, got {value!r}")
    return int(value)


def join(backend: str) -> None:
    """Join the processes that torchrun started with this one; ``leave`` comes by itself when this one ends."""
    from torch import distributed

    # Its functions have the group of all as a default value: were it imported later, with Dynamo by an optimizer, they
    # would keep the group, and its threads would still be there, and crash, when the interpreter is not.
    import_module("torch.distributed.nn")
    distributed.init_process_group(backend, timeout=PATIENCE)
    atexit.register(leave)


def leave() -> None:
    """Leave the process group, if there is one."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
