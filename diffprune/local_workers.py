"""A map over shards by processes on this machine, any of which may die.

The driver hands out shards in order, one at a time to each process; a process holds a model once, writes a shard's file
itself, and answers with counts. If it dies, the driver gives its shard to another. If the driver dies, they all end.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process, reduction
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple

from diffprune.errors import InputError, WorkerError
from diffprune.progress import set_enabled

DEATHS = 3
"""How many processes may die at one shard, or before their first one."""

Advance = Callable[[int], Any]


class Task(NamedTuple):
    """``getattr(worker, method)(*args, advance)``, for one shard."""

    shard: str
    method: str
    args: tuple[Any, ...]


class Relay:
    """A ``progress.Progress`` that tells ``advance``."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        self._advance(amount)


class LocalWorkers:
    """``count`` processes, each with an object of its own that ``recipe()`` makes. A context manager.

    Args:
        recipe: picklable; called once in each process, which has its share of the processor's cores as threads. Under
            a script of yours, that one needs ``if __name__ == "__main__":``, as with all of ``multiprocessing``.
        count: how many, at least 1. They start with the first ``map``.
        spread: where there are GPUs, each process sees one of them, in turn.
    """

    def __init__(self, recipe: Callable[[], Any], count: int, *, spread: bool = True) -> None:
        if count < 1:
            raise InputError(f"workers: expected 1 or more, got {count}")
        self._recipe, self.count, self._spread = recipe, count, spread
        self._workers: list[_Worker] = []
        self._held: list[int] = []
        self._started = self._failed_starts = 0

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def hold(self, descriptor: int) -> None:
        """Processes that start from now on keep this file open: a lock on it outlives the driver until they end."""
        self._held.append(descriptor)

    def map(self, tasks: Sequence[Task], advance: Advance, window: int | None = None) -> Iterator[tuple[Task, Any]]:
        """Run all tasks; yields each with its answer, in the order in which they end.

        ``advance`` is told of progress; what a process had told before it died is taken back. With a ``window``, no
        task is begun that is so many after one that has not ended. Raises what a task raised, or WorkerError for one at
        which ``DEATHS`` processes died; the processes are ended then.
        """
        waiting = deque(range(len(tasks)))
        open_tasks, deaths, oldest = set(waiting), [0] * len(tasks), 0
        while len(self._workers) < min(self.count, len(tasks)):
            self._start()
        try:
            while open_tasks:
                while oldest not in open_tasks:
                    oldest += 1
                self._hand_out(tasks, waiting, oldest + (window or len(tasks)))
                by_connection = {worker.connection: worker for worker in self._workers}
                for ready in connection.wait(list(by_connection)):
                    worker = by_connection[ready]
                    message = worker.next_message()
                    if message is None:
                        self._bury(worker, tasks, waiting, deaths, advance)
                        continue
                    kind, value = message
                    if kind == "advance":
                        worker.advanced += value
                        advance(value)
                    elif kind == "error":
                        raise value
                    elif kind == "done":
                        number, worker.task, worker.advanced = worker.task, None, 0
                        open_tasks.discard(number)
                        yield tasks[number], value
        finally:
            if open_tasks:
                self.stop()

    def stop(self) -> None:
        """End all processes, whatever they are at."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _hand_out(self, tasks: Sequence[Task], waiting: deque[int], end: int) -> None:
        for worker in self._workers:
            if worker.ready and worker.task is None and waiting and waiting[0] < end:
                number = waiting.popleft()
                if worker.send(tasks[number]):
                    worker.task = number
                else:  # it is dead, as the next look at its connection shows
                    waiting.appendleft(number)

    def _bury(
        self, worker: _Worker, tasks: Sequence[Task], waiting: deque[int], deaths: list[int], advance: Advance
    ) -> None:
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= DEATHS:
                raise WorkerError(f"a worker process {_end(worker)} before its first shard, {DEATHS} times; {_HELP}")
        if worker.task is not None:
            advance(-worker.advanced)
            deaths[worker.task] += 1
            if deaths[worker.task] >= DEATHS:
                raise WorkerError(
                    f"shard {tasks[worker.task].shard}: {DEATHS} worker processes died at it, the last one "
                    f"{_end(worker)}; other shards that are finished are kept. {_HELP}"
                )
            waiting.appendleft(worker.task)
        if len(self._workers) < len(waiting) + sum(other.task is not None for other in self._workers):
            self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        gpu = _gpus()[self._started % len(_gpus())] if self._spread and _gpus() else None
        about = _About(_threads(self.count), gpu, [_Inherited(descriptor) for descriptor in self._held])
        process = context.Process(target=_serve, args=(theirs, about), daemon=True, name=f"worker {self._started}")
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._started += 1
        self._workers.append(worker)
        worker.send(self._recipe)


@dataclass(eq=False)
class _Worker:
    process: Any
    connection: Connection
    ready: bool = False  # its object is made
    task: int | None = None
    advanced: int = 0  # of this task

    def send(self, message: Any) -> bool:
        """False if it is dead."""
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def next_message(self) -> tuple[str, Any] | None:
        """None if it is dead."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return None
        if message[0] == "ready":
            self.ready = True
        return message


class _Inherited:
    """A descriptor that a process gets a duplicate of, which stays open until the process ends."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _keep, (reduction.DupFd(self.descriptor),)


def _keep(duplicate: Any) -> _Inherited:
    return _Inherited(duplicate.detach())


@dataclass(frozen=True)
class _About:
    threads: int
    gpu: str | None
    inherited: list[_Inherited]


def _serve(driver: Connection, about: _About) -> None:
    """A worker process's life. Ctrl-C is the driver's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(about.threads)  # before anything that reads it is imported
    if about.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = about.gpu
    try:
        recipe = driver.recv()  # imports what it needs
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(about.threads)
        set_enabled(False)
        worker = recipe()
        driver.send(("ready", None))
        while True:
            task = driver.recv()
            driver.send(("done", getattr(worker, task.method)(*task.args, lambda n: driver.send(("advance", n)))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # no driver any more
    except BaseException as error:
        driver.send(("error", portable(error)))


def _end_with_driver() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def portable(error: BaseException) -> BaseException:
    """The exception as another process can raise it; where it was raised stands in a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a library whose exceptions cannot be pickled
        return RuntimeError(trace)
    error.add_note(f"in a worker process:\n{trace}")
    return error


def _threads(count: int) -> int:
    """For each of ``count`` processes."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(given) if given.isdecimal() and int(given) else max(1, cores // count)


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; without waking any up."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = given.split(",") if given else [str(number) for number in range(count)]
    return names[:count]


def _end(worker: _Worker) -> str:
    code = worker.process.exitcode
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in signal.Signals.__members__.values() else f"signal {-code}"
    return f"was killed by {name}" + (", as the system does where memory runs out" if name == "SIGKILL" else "")


_HELP = "Give fewer --workers if memory is short, and look at that shard with `diffprune verify --decode`"
