"""``sample`` by several processes: the bytes of one, and the grid; killed, in parts, under torchrun."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from children import ended, fork
from small_run import contents
from test_sampling import make_checkpoint
from test_stage_ranks import torchrun
from typer.testing import CliRunner

import diffprune
from diffprune import locks
from diffprune.checkpoints import read_state, read_tensors, save_checkpoint
from diffprune.cli.app import app
from diffprune.errors import BusyError, DiskFullError, InputError, ResumeError
from diffprune.locks import folder_lock, shard_claim

COUNT = 23
FEW = {"count": COUNT, "shard_size": 4, "batch_size": 3, "steps": 4, "seed": 5}  # six shards


@pytest.fixture(scope="module")
def models(small_run, tmp_path_factory) -> dict[str, str]:
    """A model whose weights are all at work, and a smaller one that begins, guided, for labels of a list."""
    root = tmp_path_factory.mktemp("models")
    small = make_checkpoint(small_run, root / "small", scale=0.3, depth=1, hidden_size=16)
    large = make_checkpoint(small_run, root / "large")
    return {"checkpoint": str(large), "vqvae": str(small_run.vqvae), "coarse": str(small)}


def draw(models: dict[str, str], out: Path, **changes) -> dict:
    """With a grid among the shards."""
    options = {**FEW, "coarse_until": 0.6, "guidance": 1.5, "labels": [4, 1, 7], "grid": out / "grid.png"}
    return diffprune.sample(**models, out=out, **{**options, **changes})


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory) -> tuple[dict, dict[str, bytes]]:
    """What one process says and writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    report = draw(models, out)
    assert report["written"] == 6 and len(contents(out)) == 8
    return report, contents(out)


def numbers(report: dict) -> dict:
    return {name: value for name, value in report.items() if name not in ("out", "shards", "grid")}


def test_two_workers_are_as_one_process(models, alone, tmp_path):
    report = draw(models, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == alone[1] and numbers(report) == numbers(alone[0])


@pytest.mark.parametrize("order", [("1/2", "2/2"), ("3/3", "1/3", "2/3")])
def test_parts_are_as_one_process_and_the_last_makes_the_grid(models, alone, tmp_path, order):
    out, reports = tmp_path / "out", []
    for part in order:
        workers = 2 if part == "3/3" else 1
        planned = draw(models, out, part=part, dry_run=True)
        reports.append(draw(models, out, part=part, workers=workers))
        assert {name: planned[name] for name in reports[-1] if name != "grid"} == {
            name: value for name, value in reports[-1].items() if name != "grid"
        }
        is_last = part == order[-1]
        assert (reports[-1]["grid"] == str(out / "grid.png")) == (out / "grid.png").is_file() == is_last
        # What `evaluate` compares the number of images with is what all parts are to draw.
        assert json.loads((out / "sample.json").read_text())["plan"]["count"] == COUNT
        assert not list(out.glob(".tmp-*"))
    assert contents(out) == alone[1]
    for name in ("written", "model_evaluations", "coarse_evaluations"):
        assert sum(report[name] for report in reports) == alone[0][name]
    assert sorted(shard for report in reports for shard in report["shards"]) == sorted(
        map(str, out.glob("samples-*.tar"))
    )
    (out / "grid.png").unlink()
    whole = draw(models, out)
    assert (whole["written"], whole["present"], whole["model_evaluations"]) == (0, 6, 0)
    assert contents(out) == alone[1]


def test_a_part_with_no_shards_and_the_whole_completes(models, alone, tmp_path):
    assert draw(models, tmp_path / "out", part="2/7")["written"] == 1
    assert draw(models, tmp_path / "out", part="1/7")["shards"] == []
    assert draw(models, tmp_path / "out")["written"] == 5
    assert contents(tmp_path / "out") == alone[1]


def test_parts_at_once(models, alone, tmp_path):
    """Both begin the folder, and both may come to the end together."""
    out = tmp_path / "out"
    children = [fork(lambda part=part: draw(models, out, part=part)) for part in ("1/3", "2/3", "3/3")]
    assert all(ended(child, wait=True) for child in children)
    assert contents(out) == alone[1]


def test_a_grid_that_another_part_is_writing_is_left_to_it(models, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    draw(models, tmp_path / "out", part="1/2")
    with shard_claim(tmp_path / "out", "grid"):
        draw(models, tmp_path / "out", part="2/2")
        assert not (tmp_path / "out/grid.png").exists()
    draw(models, tmp_path / "out", part="2/2")
    assert contents(tmp_path / "out") == alone[1]


@pytest.mark.parametrize("part", [None, "1/2"])
def test_a_killed_run_goes_on(models, alone, tmp_path, part):
    out = tmp_path / "out"
    slow = {"steps": 100}
    child = fork(lambda: draw(models, out, part=part, **slow))
    wait_for(lambda: list(out.glob("samples-*.tar")))
    os.kill(child, signal.SIGKILL)
    assert not ended(child, wait=True)
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("samples-*.tar")}
    assert 1 <= len(there) < 6
    (out / ".tmp-node-7-samples-000001.tar").write_bytes(b"of a Ray actor that was killed")
    report = draw(models, out, part=part, **slow)
    assert report["present"] == len(there)
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
    if part:
        draw(models, out, part="2/2", **slow)
    draw(models, out, **slow)
    draw(models, tmp_path / "whole", **slow)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_worker_that_is_killed_changes_nothing(models, tmp_path):
    out, killed, slow = tmp_path / "out", [], {"steps": 100}

    def kill() -> None:
        wait_for(lambda: list(out.glob("samples-*.tar")))
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        killed.append(int(workers[0]))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    draw(models, out, workers=2, **slow)
    thread.join()
    draw(models, tmp_path / "one", **slow)
    assert killed and contents(out) == contents(tmp_path / "one")


def test_torchrun_is_as_one_process(models, alone, tmp_path):
    options = {**FEW, **models, "coarse_until": 0.6, "guidance": 1.5, "labels": [4, 1, 7]}
    requests = []
    for name, changes in (
        ("out", {"grid": str(tmp_path / "out" / "grid.png")}),
        ("other", {"grid": str(tmp_path / "other" / "grid.png"), "part": "1/2"}),
        ("out", {"seed": 6}),
        (None, {"grid": str(tmp_path / "alone.png")}),
    ):
        given = {**options, **changes, "out": name and str(tmp_path / name)}
        answer = str(tmp_path / f"answer-{len(requests)}")
        requests.append({"stage": "sample", "arguments": [], "options": given, "answer": answer})
    torchrun(2, requests, tmp_path)
    assert contents(tmp_path / "out") == alone[1] and not (tmp_path / "other").exists()
    assert (tmp_path / "alone.png").is_file()
    whole, part, other, grid = (
        [json.loads((tmp_path / f"answer-{number}-{rank}.json").read_text()) for rank in (0, 1)] for number in range(4)
    )
    assert whole[0] == whole[1] and numbers(whole[0]) == numbers(alone[0])
    assert all("torchrun's processes are the workers" in told["error"] for told in part)
    assert "seed: 5 there, 6 now" in other[0]["error"] and "another process of this run" in other[1]["error"]
    assert grid[0] == grid[1] and grid[0]["model_evaluations"] == alone[0]["model_evaluations"]


def test_one_run_at_a_time(models, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    out = tmp_path / "out"
    with folder_lock(out):
        for part in (None, "1/2"):
            with pytest.raises(BusyError, match=f"is at work there: process {os.getpid()} on "):
                draw(models, out, part=part)
        assert not list(out.glob("sample*"))
    draw(models, out, part="1/2")
    with folder_lock(out, shared=True):
        with pytest.raises(BusyError, match="is at work there"):
            draw(models, out)
        with shard_claim(out, "samples-000003"), pytest.raises(BusyError, match="shard samples-000003 is being done"):
            draw(models, out, part="2/2")
        draw(models, out, part="2/2")
    assert contents(out) == alone[1]


def test_parts_that_cannot_be(models, tmp_path):
    for changes, message in (
        ({"part": "0/2"}, "part: expected I/N with I from 1 to N, such as 3/64, got '0/2'"),
        ({"part": "3/2"}, "got '3/2'"),
        ({"part": "half"}, "got 'half'"),
        ({"workers": 0}, "workers: expected 1 or more, got 0"),
        ({"part": "1/2", "ray": "auto"}, "give no --part with it"),
        ({"part": "1/2", "out": None}, "share out shards: give a folder for them"),
        ({"workers": 2, "out": None}, "share out shards: give a folder for them"),
    ):
        with pytest.raises(InputError, match=message):
            diffprune.sample(**models, **{"out": tmp_path / "x", "grid": tmp_path / "g.png", **FEW, **changes})
    assert os.listdir(tmp_path) == []
    draw(models, tmp_path / "out", part="1/2")
    with pytest.raises(ResumeError, match="seed: 5 there, 6 now"):
        draw(models, tmp_path / "out", part="2/2", seed=6)
    with pytest.raises(ResumeError, match="count: 23 there, 24 now"):
        draw(models, tmp_path / "out", part="2/2", count=24)


def test_shards_that_are_there_are_looked_at(models, alone, tmp_path):
    out = tmp_path / "out"
    draw(models, out)
    data = (out / "samples-000003.tar").read_bytes()
    for bytes_there, found in (
        (data[: len(data) // 2], "at byte [0-9,]+: "),
        ((out / "samples-000002.tar").read_bytes(), "4 samples that are not those"),
        (b"", "the file is empty"),
    ):
        (out / "samples-000003.tar").write_bytes(bytes_there)
        for changes in ({}, {"part": "2/2", "workers": 2}, {"dry_run": True}, {"part": "1/2"}):  # whose grid shows it
            with pytest.raises(InputError, match=rf"samples-000003\.tar: expected the samples .*12 to .*15, .*{found}"):
                draw(models, out, **changes)
    for name in ("samples-000000.tar", "samples-000003.tar", "grid.png"):
        (out / name).unlink()
    again = draw(models, out, workers=2)
    assert (again["written"], again["present"]) == (2, 4)
    assert contents(out) == alone[1]
    data = bytearray((out / "samples-000000.tar").read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    (out / "samples-000000.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"key 'sample-00000000': .*delete its shard"):  # by the grid, which shows it
        draw(models, out)


def test_what_a_worker_runs_into_is_told(models, tmp_path, monkeypatch):
    state = read_state(Path(models["checkpoint"]))
    tensors = read_tensors(Path(models["checkpoint"]), state, "ema")
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"] * float("nan")
    bad = {**models, "checkpoint": save_checkpoint(tmp_path / "bad", state, {"ema": tensors})}
    with pytest.raises(diffprune.DiffpruneError, match=r"generated latents are not finite, key 'sample-000000"):
        draw(bad, tmp_path / "nan", workers=2)
    assert not list((tmp_path / "nan").glob("*samples*"))

    def full(path, samples):
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr("diffprune.sampling.write_shard", full)
    with pytest.raises(DiskFullError, match=r"full: no space left on the disk .*0 of 6 shards are finished and kept"):
        draw(models, tmp_path / "full")


def test_the_command_takes_them(models, tmp_path):
    given = ["sample", models["checkpoint"], "--vqvae", models["vqvae"], "-o", str(tmp_path / "out")]
    given += ["--count", "2500", "--part", "2/3", "--workers", "2", "--dry-run", "--json"]
    found = json.loads(CliRunner().invoke(app, given).stdout)
    assert found["shards"] == [str(tmp_path / "out" / "samples-000001.tar")]
    assert (found["written"], found["model_evaluations"], found["count"]) == (1, 1000 * 50, 2500)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
