"""Worker processes: each shard is done once, whoever dies; errors come through; nobody outlives the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from worker_recipes import Hopeless, Sleeper, Squares, lines

from diffprune.errors import InputError, WorkerError
from diffprune.local_workers import LocalWorkers, Task

SHARDS = [f"s{number}" for number in range(7)]


def tasks() -> list[Task]:
    return [Task(shard, "square", (shard, number)) for number, shard in enumerate(SHARDS)]


def test_every_shard_is_done_once_and_progress_adds_up(tmp_path):
    told: list[int] = []
    with LocalWorkers(Squares(tmp_path), 3, spread=False) as workers:
        found = {task.shard: value for task, value in workers.map(tasks(), told.append)}
        assert found == {shard: number**2 for number, shard in enumerate(SHARDS)}
        again = dict(workers.map([Task("more", "square", ("more", 9))], told.append))  # the same processes
    assert list(again.values()) == [81]
    assert sum(told) == 2 * (len(SHARDS) + 1)
    assert sorted(line for line in lines(tmp_path) if "begin s" in line) == [f"begin {shard}" for shard in SHARDS]
    assert list(LocalWorkers(Squares(tmp_path), 2, spread=False).map([], told.append)) == []


@pytest.mark.parametrize("deaths", [1, 2])
def test_the_shard_of_a_process_that_is_killed_is_done_by_another(tmp_path, deaths):
    told: list[int] = []
    with LocalWorkers(Squares(tmp_path, dies_at="s2", times=deaths), 2, spread=False) as workers:
        found = {task.shard: value for task, value in workers.map(tasks(), told.append)}
    assert found == {shard: number**2 for number, shard in enumerate(SHARDS)}
    assert sum(told) == 2 * len(SHARDS) and min(told) == -1  # what the dead one had told was taken back
    assert sum(line == "begin s2" for line in lines(tmp_path)) == deaths + 1
    assert all(sum(line == f"begin {shard}" for line in lines(tmp_path)) == 1 for shard in SHARDS if shard != "s2")


def test_a_shard_that_kills_three_processes_is_named_and_the_rest_is_kept(tmp_path):
    with (
        LocalWorkers(Squares(tmp_path, dies_at="s2", times=99), 2, spread=False) as workers,
        pytest.raises(
            WorkerError, match=r"shard s2: 3 worker processes died at it, the last one was killed by SIGKILL"
        ),
    ):
        list(workers.map(tasks(), lambda count: None))
    assert {"s0.txt", "s1.txt"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "s2.txt").exists()


def test_processes_that_die_before_their_first_shard_end_the_run(tmp_path):
    with (
        LocalWorkers(Hopeless(), 2, spread=False) as workers,
        pytest.raises(WorkerError, match=r"killed by SIGKILL.* before its first shard, 3 times"),
    ):
        list(workers.map(tasks(), lambda count: None))


def test_what_a_process_raises_is_raised_here(tmp_path):
    with LocalWorkers(Squares(tmp_path), 1, spread=False) as workers:
        with pytest.raises(InputError, match="s0: refused") as raised:
            list(workers.map([Task("s0", "refuse", ("s0",))], print))
        assert "in refuse" in raised.value.__notes__[0]  # where it was
        with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
            list(workers.map([Task("s0", "raise_unpicklable", ())], print))
    with pytest.raises(InputError, match="workers: expected 1 or more, got 0"):
        LocalWorkers(Squares(tmp_path), 0)


def test_no_task_is_begun_that_is_a_window_after_one_that_has_not_ended(tmp_path):
    # The first waits for the fourth, which is in the window of 4, but in none of 2.
    waits = [Task("s0", "wait_for", ("s0", "s3"))] + [Task(s, "wait_for", (s, "")) for s in SHARDS[1:]]
    for window, order in ((4, ["begin s3", "end s0"]), (2, ["end s0", "begin s3"])):
        folder = tmp_path / str(window)
        folder.mkdir()
        with LocalWorkers(Squares(folder), 2, spread=False) as workers:
            assert len(list(workers.map(waits, print, window=window))) == len(SHARDS)
        assert [line for line in lines(folder) if line in order] == order


def test_processes_share_the_cores(tmp_path, monkeypatch):
    task = [Task("s", "threads", ())]
    with LocalWorkers(Squares(tmp_path), 1, spread=False) as workers:
        assert [value for _, value in workers.map(task, print)] == [os.environ["OMP_NUM_THREADS"]]
    monkeypatch.delenv("OMP_NUM_THREADS")
    with LocalWorkers(Squares(tmp_path), 2, spread=False) as workers:
        cores = len(os.sched_getaffinity(0))
        assert [value for _, value in workers.map(task, print)] == [str(max(1, cores // 2))]


DRIVER = """
import sys
from pathlib import Path
from worker_recipes import Sleeper
from diffprune.local_workers import LocalWorkers, Task
if __name__ == "__main__":
    with LocalWorkers(Sleeper(Path(sys.argv[1])), 2, spread=False) as workers:
        list(workers.map([Task(s, "sleep", (s,)) for s in "ab"], print))
"""


def test_no_process_outlives_a_driver_that_is_killed(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py", tmp_path], env=environment)
    wait_until(lambda: len(lines(tmp_path)) == 2)
    pids = [int(line.split()[1]) for line in lines(tmp_path)]
    assert all(map(is_alive, pids))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_until(lambda: not any(map(is_alive, pids)))


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


assert Sleeper  # the driver's
