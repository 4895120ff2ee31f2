"""A map over shards by actors on a Ray cluster (the extra ``ray``): any node may be lost.

Each actor holds a model, is placed on as many nodes as there are, and writes a shard's file itself: the folder has to
be on storage that all nodes see. The driver hands out shards as ``LocalWorkers`` does. What a lost actor was at is
given to another; a shard that takes far longer than most gets a second copy, and whichever ends first counts: both
write the same bytes, each under a temporary name of its own.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Any

from diffprune._version import __version__
from diffprune.environment import prepare
from diffprune.errors import InputError, WorkerError
from diffprune.local_workers import DEATHS, Advance, Task, portable

STRAGGLER = 3.0
"""A shard is begun a second time after so many times the median shard's seconds, once there is none to begin first."""

LOOK_EVERY = 0.5  # seconds


class RayWorkers:
    """Actors on the cluster at ``address``: a context manager.

    Args:
        recipe: as of ``LocalWorkers``.
        address: "auto", a running cluster that this machine is part of; "local", one of this machine alone; or a
            cluster's address.
        count: actors; by default one for each GPU of the cluster, or, without any, for each CPU.
    """

    def __init__(self, recipe: Callable[[], Any], address: str, count: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("ray: not installed; run `pip install diffprune[ray]`") from None
        self._ray, self._recipe = ray, recipe
        self._started = not ray.is_initialized()
        if self._started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that begins here: it tells nobody
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="diffprune")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(f"ray: no cluster at {address!r} ({error}); start one with `ray start`") from error
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.count = count or max(1, gpus or int(resources.get("CPU", 1)))
        self._needs = {"num_cpus": 1, "num_gpus": min(1.0, gpus / self.count) if gpus else 0}
        self._actors: list[_Actor] = []
        self._begun: dict[Any, _Call] = {}  # by what Ray calls a result to come

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in list(self._actors):
            self._drop(actor)
        if self._started:
            self._ray.shutdown()

    def hold(self, descriptor: int) -> None:
        """Of no use to other machines: the lock is the driver's, and actors end with it."""

    def map(self, tasks: Sequence[Task], advance: Advance, window: int | None = None) -> Iterator[tuple[Task, Any]]:
        """As ``LocalWorkers.map``; ``advance`` is told when a shard has ended."""
        waiting, open_tasks = deque(range(len(tasks))), set(range(len(tasks)))
        deaths, oldest, took = [0] * len(tasks), 0, []
        while len(self._actors) < min(self.count, len(tasks)):
            self._start()
        try:
            while open_tasks:
                while oldest not in open_tasks:
                    oldest += 1
                self._hand_out(tasks, waiting, open_tasks, oldest + (window or len(tasks)), took)
                ready, _ = self._ray.wait(list(self._begun), timeout=LOOK_EVERY)
                for reference in ready:
                    call = self._begun.pop(reference)
                    answer = self._answer(reference)
                    if answer is None:
                        self._bury(call, tasks, waiting, open_tasks, deaths)
                        continue
                    call.actor.call = None
                    if call.task is None or call.task not in open_tasks:  # its first word, or the second copy's
                        continue
                    value, advanced, error = answer
                    if error is not None:
                        raise error
                    took.append(time.monotonic() - call.began)
                    open_tasks.discard(call.task)
                    advance(advanced)
                    yield tasks[call.task], value
        finally:
            # Nothing is written after the map: neither by what is left of an error, nor by a copy that came second.
            for actor in [actor for actor in self._actors if actor.call is not None]:
                self._drop(actor)

    def _hand_out(
        self, tasks: Sequence[Task], waiting: deque[int], open_tasks: set[int], end: int, took: list[float]
    ) -> None:
        for actor in self._actors:
            if actor.call is not None:
                continue
            if waiting and waiting[0] < end:
                self._begin(actor, tasks, waiting.popleft())
            elif not waiting and took and (number := self._straggler(open_tasks, median(took))) is not None:
                self._begin(actor, tasks, number)

    def _straggler(self, open_tasks: set[int], usual: float) -> int | None:
        """A task that one actor has been at for far too long."""
        calls = [call for call in self._begun.values() if call.task in open_tasks]
        late = time.monotonic() - max(STRAGGLER * usual, LOOK_EVERY)
        for call in calls:
            if call.began < late and sum(other.task == call.task for other in calls) == 1:
                return call.task
        return None

    def _begin(self, actor: _Actor, tasks: Sequence[Task], number: int) -> None:
        reference = actor.handle.run.remote(*tasks[number][1:])
        actor.call = self._begun[reference] = _Call(actor, number, time.monotonic())

    def _answer(self, reference: Any) -> tuple[Any, int, BaseException | None] | None:
        """What an actor said; None if it is lost."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:  # Ray's own trouble, such as a result that cannot be sent
            raise
        except self._ray.exceptions.RayError:
            return None

    def _bury(
        self, call: _Call, tasks: Sequence[Task], waiting: deque[int], open_tasks: set[int], deaths: list[int]
    ) -> None:
        self._drop(call.actor)
        if call.task in open_tasks:
            deaths[call.task] += 1
            if deaths[call.task] >= DEATHS:
                raise WorkerError(
                    f"shard {tasks[call.task].shard}: {DEATHS} Ray actors were lost at it; other shards that are "
                    "finished are kept. See Ray's log for why, and look at that shard with `diffprune verify --decode`"
                )
            if not any(other.task == call.task for other in self._begun.values()):
                waiting.appendleft(call.task)
        self._start()

    def _start(self) -> None:
        """One more actor. It is given a shard once it has said its first word: it may have to wait for a node."""
        kind = self._ray.remote(_Holder).options(scheduling_strategy="SPREAD", max_restarts=0, **self._needs)
        actor = _Actor(kind.remote(self._recipe, __version__))
        actor.call = _Call(actor, None, time.monotonic())
        self._begun[actor.handle.is_there.remote()] = actor.call
        self._actors.append(actor)

    def _drop(self, actor: _Actor) -> None:
        self._ray.kill(actor.handle)
        self._actors.remove(actor)
        self._begun = {reference: call for reference, call in self._begun.items() if call.actor is not actor}


@dataclass(eq=False)
class _Actor:
    handle: Any
    call: _Call | None = None


@dataclass(eq=False)
class _Call:
    actor: _Actor
    task: int | None  # None: whether it is there
    began: float


class _Holder:
    """What an actor is: an object of the recipe's, made with the first shard."""

    def __init__(self, recipe: Callable[[], Any], version: str) -> None:
        self._recipe, self._version, self._worker = recipe, version, None
        prepare()

    def is_there(self) -> tuple[None, int, None]:
        return None, 0, None

    def run(self, method: str, args: tuple[Any, ...]) -> tuple[Any, int, BaseException | None]:
        """The answer, by how much it advanced, and what it raised."""
        from diffprune.files import set_writer
        from diffprune.progress import set_enabled

        told: list[int] = []
        try:
            if self._worker is None:
                if __version__ != self._version:
                    raise InputError(f"ray: a node has diffprune {__version__}, the driver {self._version}")
                set_enabled(False)
                set_writer(f"{os.uname().nodename}-{os.getpid()}-")
                self._worker = self._recipe()
            return getattr(self._worker, method)(*args, told.append), sum(told), None
        except Exception as error:
            return None, sum(told), portable(error)
