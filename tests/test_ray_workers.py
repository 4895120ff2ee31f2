"""On a Ray cluster of three nodes on this machine: the same bytes, a node lost on the way or not."""

from __future__ import annotations

import time

import pytest
from ray_cluster import three_nodes
from small_run import contents
from worker_recipes import Squares, lines

import diffprune
from diffprune.errors import InputError, WorkerError
from diffprune.local_workers import Task

pytest.importorskip("ray")
MODEL = """
import time
from pathlib import Path

def embed(images):
    time.sleep(0.2)
    return images.float().flatten(1) + 1

embed.image_size = 4
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    (models / "slow_model.py").write_text(MODEL)
    with three_nodes(models) as (made, nodes):
        yield made, nodes, models


def test_the_bytes_are_those_of_one_process(small_run, cluster, tmp_path):
    made = cluster[0]
    options = {"methods": ("loss", "grand", "moso"), "device": "cpu", "batch_size": 16}
    diffprune.score(small_run.latents, small_run.surrogate, tmp_path / "ray", ray=made.address, **options)
    diffprune.score(small_run.latents, small_run.surrogate, tmp_path / "one", **options)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    options = {"count": 23, "shard_size": 5, "steps": 2, "device": "cpu"}
    run = (small_run.surrogate, small_run.vqvae)
    found = diffprune.sample(*run, tmp_path / "drawn", grid=tmp_path / "drawn/grid.png", ray=made.address, **options)
    assert found == {**diffprune.sample(*run, tmp_path / "alone", grid=tmp_path / "alone/grid.png", **options)} | {
        name: found[name] for name in ("out", "shards", "grid")
    }
    assert contents(tmp_path / "drawn") == contents(tmp_path / "alone")
    with pytest.raises(InputError, match="give no --part with it"):
        diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "x", ray=made.address, part="1/2")


def test_stragglers_get_a_second_copy_and_errors_come_through(cluster, tmp_path):
    from diffprune.ray_workers import RayWorkers

    told: list[int] = []
    with RayWorkers(Squares(tmp_path), cluster[0].address, 2) as workers:
        tasks = [Task(f"s{n}", "square", (f"s{n}", n)) for n in range(6)] + [Task("slow", "slow_once", ("slow",))]
        began = time.monotonic()
        assert {task.shard: value for task, value in workers.map(tasks, told.append)} == {
            **{f"s{n}": n * n for n in range(6)},
            "slow": "copy",
        }
        assert time.monotonic() - began < 45 and sum(told) == 2 * 6
        with pytest.raises(InputError, match="s: refused"):
            list(workers.map([Task("s", "refuse", ("s",))], told.append))
    folder = tmp_path / "dies"
    folder.mkdir()
    with (
        RayWorkers(Squares(folder, dies_at="s1", times=1), cluster[0].address, 2) as workers,
    ):
        assert len(list(workers.map(tasks[:4], told.append))) == 4
    assert lines(folder).count("begin s1") == 2
    folder = tmp_path / "hopeless"
    folder.mkdir()
    with (
        RayWorkers(Squares(folder, dies_at="s1", times=99), cluster[0].address, 2) as workers,
        pytest.raises(WorkerError, match="shard s1: 3 Ray actors were lost at it"),
    ):
        list(workers.map(tasks[:4], told.append))


def test_a_node_that_is_lost_changes_nothing(small_run, cluster, tmp_path, monkeypatch):
    made, nodes, models = cluster
    monkeypatch.syspath_prepend(str(models))
    diffprune.pack(small_run.images, tmp_path / "shards", shard_size=10)
    options = {"model": "slow_model:embed", "batch_size": 5}
    removed: list[int] = []
    from diffprune import ray_workers

    real = ray_workers.RayWorkers._begin

    def begin(self, actor, tasks, number):
        real(self, actor, tasks, number)
        if number == 5 and not removed:
            removed.append(number)
            made.remove_node(nodes[0], allow_graceful=False)

    monkeypatch.setattr(ray_workers.RayWorkers, "_begin", begin)
    diffprune.embed(tmp_path / "shards", tmp_path / "ray", ray=made.address, **options)
    diffprune.embed(tmp_path / "shards", tmp_path / "one", **options)
    assert removed == [5] and contents(tmp_path / "ray") == contents(tmp_path / "one")
