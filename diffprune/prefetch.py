"""The next shard is read and decoded in a thread while this one is computed on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Generic, TypeVar

Part = TypeVar("Part")


class Prefetch(Generic[Part]):
    """Shards in parts (batches, or whole arrays), each read before it is asked for. A context manager::

        with Prefetch(read, stems) as shards:
            for stem in stems:                   # or run_stage, whose `work` asks for a shard
                for part in shards.parts(stem):
                    ...                          # meanwhile a thread reads on, over the end of the shard

    Args:
        read: shard -> its parts in order; runs in one thread of its own. What it yields has to be in memory: of a
            memory-mapped array yield a copy (``np.array(array[rows])``), or the pages are read where they are used.
        shards: the order in which shards will be asked for.
        ahead: how many parts are kept ready at most, besides the one that the caller holds: the bound on memory. At
            least 2, as the end of a shard takes the place of a part.
        skip: true for a shard that will not be asked for, such as one that is done; it is not read ahead.

    Shards may be asked for in any order, several times, or left half-way: the answer is the same, but a shard that
    is not the next one is waited for. An exception of ``read`` is raised by ``parts`` of that shard, after the parts
    before it. Leaving the block, by Ctrl-C too, ends the thread and closes ``read``'s generator. The thread starts
    with the first ``parts``, which must all be called by one thread.
    """

    def __init__(
        self,
        read: Callable[[str], Iterable[Part]],
        shards: Sequence[str],
        *,
        ahead: int = 2,
        skip: Callable[[str], bool] | None = None,
    ) -> None:
        if ahead < 2:
            raise ValueError(f"expected ahead of 2 or more, got {ahead}")
        self._read, self._shards, self._ahead = read, list(shards), ahead
        self._skip = skip or (lambda shard: False)
        self._thread: ThreadPoolExecutor | None = None
        self._walk: Generator[_Step, None, None] | None = None
        self._steps: deque[Future[_Step | None]] = deque()  # the walk's next steps in order, None after its end

    def __enter__(self) -> Prefetch[Part]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def parts(self, shard: str) -> Iterator[Part]:
        """The parts of one shard, in order; raises what ``read`` raised."""
        if not self._comes_next(shard):
            self._stop()
            self._start(shard)
        for number in count():
            step = self._take()
            if step is None or (step.shard, step.number) != (shard, number):
                raise RuntimeError(f"{shard}: another shard's parts were asked for before this one's were all taken")
            if step.error is not None:
                raise step.error
            if step.is_end:
                return
            yield step.part

    def _comes_next(self, shard: str) -> bool:
        """Whether the next step is this shard's first; waits for that step."""
        step = self._steps[0].result() if self._steps else None
        return step is not None and (step.shard, step.number) == (shard, 0)

    def _start(self, shard: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._walk = self._steps_from(shard)
        self._steps.extend(self._thread.submit(next, self._walk, None) for _ in range(self._ahead))

    def _take(self) -> _Step | None:
        if self._thread is None:
            return None
        step = self._steps.popleft().result()
        self._steps.append(self._thread.submit(next, self._walk, None))
        return step

    def _stop(self) -> None:
        if self._thread is None or self._walk is None:
            return
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._walk.close()
        self._steps.clear()
        self._thread = self._walk = None

    def _steps_from(self, first: str) -> Generator[_Step, None, None]:
        """Runs in the thread, one step at a time. Ends at an error: what comes after it may depend on it."""
        for shard in self._shards[self._shards.index(first) :]:
            if shard != first and self._skip(shard):
                continue
            number = 0
            try:
                for part in self._read(shard):
                    yield _Step(shard, number, part)
                    number += 1
            except Exception as error:
                yield _Step(shard, number, error=error)
                return
            yield _Step(shard, number, is_end=True)


@dataclass(frozen=True)
class _Step:
    """One part of a shard; or its end, or what reading it raised, numbered after its last part."""

    shard: str
    number: int
    part: Any = None
    is_end: bool = False
    error: Exception | None = None
