"""Parts come in order whatever is asked for, are read ahead and no further, and no thread outlives the block."""

from __future__ import annotations

import threading
import time

import pyarrow as pa
import pytest

from diffprune.engines import run_stage
from diffprune.prefetch import Prefetch

SHARDS = ["a", "b", "c", "d"]
EXPECTED = {"a": [("a", 0), ("a", 1), ("a", 2)], "b": [], "c": [("c", 0)], "d": [("d", 0), ("d", 1)]}


def read(shard: str):
    yield from EXPECTED[shard]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert prefetch_threads() == []


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


@pytest.mark.parametrize("ahead", [2, 3, 50])
@pytest.mark.parametrize("order", ["abcd", "dcba", "aabbccdd", "abcdabcd", "dd", "bca", "acbd"])
def test_parts_are_the_same_in_any_order(order, ahead):
    with Prefetch(read, SHARDS, ahead=ahead) as shards:
        for shard in order:
            assert list(shards.parts(shard)) == EXPECTED[shard]


def test_a_shard_left_half_way_does_not_confuse_the_next():
    with Prefetch(read, SHARDS) as shards:
        assert next(shards.parts("a")) == ("a", 0)
        assert list(shards.parts("a")) == EXPECTED["a"]
        assert next(shards.parts("a")) == ("a", 0)
        assert list(shards.parts("c")) == EXPECTED["c"]
        half = shards.parts("d")
        assert next(half) == ("d", 0)
        assert list(shards.parts("a")) == EXPECTED["a"]
        with pytest.raises(RuntimeError, match="another shard's parts"):
            next(half)
    assert list(half) == []


def test_reading_goes_on_over_the_end_of_a_shard_and_stops_at_the_bound():
    started: list[str] = []

    def noted(shard: str):
        for part in range(5):
            started.append(f"{shard}{part}")
            yield part

    with Prefetch(noted, ["a", "b", "c"], ahead=3) as shards:
        parts = shards.parts("a")
        for _ in range(5):
            next(parts)
        # the caller computes on a4; ready are the end of a, b0 and b1, and nothing more is begun
        wait_for(lambda: "b1" in started)
        time.sleep(0.05)
        assert started == ["a0", "a1", "a2", "a3", "a4", "b0", "b1"]


def test_whole_shards_are_read_one_ahead():
    started: list[str] = []

    def whole(shard: str):
        started.append(shard)
        yield shard

    with Prefetch(whole, SHARDS) as shards:
        for shard, ahead in (("a", "b"), ("b", "c"), ("c", "d")):
            [_] = shards.parts(shard)
            wait_for(lambda ahead=ahead: ahead in started)
        assert started == ["a", "b", "c", "d"]


def test_done_shards_are_not_read_unless_asked_for():
    started: list[str] = []

    def noted(shard: str):
        started.append(shard)
        yield shard

    with Prefetch(noted, SHARDS, skip=lambda shard: shard in "bc") as shards:
        assert list(shards.parts("a")) == ["a"]
        assert list(shards.parts("d")) == ["d"]
        assert started == ["a", "d"]
        assert list(shards.parts("b")) == ["b"]


def test_an_error_is_raised_where_it_belongs_and_reading_can_go_on():
    broken = {"b"}

    def failing(shard: str):
        yield shard, 0
        if shard in broken:
            raise OSError(f"{shard} vanished")
        yield shard, 1

    with Prefetch(failing, SHARDS, ahead=10) as shards:
        assert list(shards.parts("a")) == [("a", 0), ("a", 1)]  # although b has failed by now
        seen = []
        with pytest.raises(OSError, match="b vanished"):
            for part in shards.parts("b"):
                seen.append(part)
        assert seen == [("b", 0)]
        assert list(shards.parts("c")) == [("c", 0), ("c", 1)]
        broken.clear()
        assert list(shards.parts("b")) == [("b", 0), ("b", 1)]


def test_leaving_by_an_exception_closes_the_reader():
    closed = threading.Event()

    def endless(shard: str):
        try:
            while True:
                yield shard
        finally:
            closed.set()

    with pytest.raises(KeyboardInterrupt), Prefetch(endless, ["a"]) as shards:
        next(shards.parts("a"))
        raise KeyboardInterrupt
    assert closed.is_set() and prefetch_threads() == []


def test_a_stage_on_it_is_interrupted_resumed_and_tells_progress(tmp_path):
    reads: list[str] = []

    def noted(shard: str):
        reads.append(shard)
        yield from range(3)

    def run(stop_at: str | None) -> dict:
        with Prefetch(noted, SHARDS, skip=lambda shard: (tmp_path / f"{shard}.parquet").is_file()) as shards:

            def work(shard, bar):
                keys = []
                for part in shards.parts(shard):
                    if shard == stop_at:
                        raise KeyboardInterrupt
                    keys.append(f"{shard}{part}")
                    bar.advance()
                return pa.table({"key": keys, "status": ["ok"] * 3, "error": pa.nulls(3, pa.string())})

            return run_stage("map", tmp_path, {}, SHARDS, work, total=12)

    with pytest.raises(KeyboardInterrupt):
        run("c")
    assert prefetch_threads() == []
    assert sorted(path.stem for path in tmp_path.glob("*.parquet")) == ["a", "b"]
    reads.clear()
    result = run(None)
    assert reads == ["c", "d"]
    assert (result["shards_done_before"], result["samples"]) == (2, 12)


def test_the_bound_is_checked():
    with pytest.raises(ValueError, match="2 or more, got 1"):
        Prefetch(read, SHARDS, ahead=1)
