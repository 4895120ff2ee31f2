"""Two runs in one folder: one wins, the other says so; parts of one run share it; a dead run's lock is nobody's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_run import DIT_OVERRIDES, contents
from test_tables import make_table

import diffprune
from diffprune import locks
from diffprune.config import load_config
from diffprune.engines import Engine, parse_part, run_stage
from diffprune.errors import BusyError, InputError, ResumeError
from diffprune.locks import LOCK_FILE, folder_lock, shard_claim

SHARDS = [f"s{number}" for number in range(7)]


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)


def stage(out, work=None, **engine) -> dict:
    work = work or (lambda stem, bar: make_table(stem, [f"{stem}-{i}" for i in range(3)]))
    return run_stage("embed", out, {"seed": 1}, SHARDS, work, total=21, engine=Engine(**engine))


def test_the_second_run_names_the_first_and_changes_nothing(tmp_path):
    out = tmp_path / "out"
    seen = []

    def work(stem, bar):
        if not seen:
            before = contents(out)
            for call in (lambda: stage(out), lambda: stage(out, part=(1, 2))):
                with pytest.raises(BusyError, match=rf"out: .* is at work there: process {os.getpid()} on "):
                    call()
            seen.append(contents(out) == before)
        return make_table(stem, [stem])

    stage(out, work)
    assert seen == [True]
    assert not list(out.glob(".tmp-*"))  # the lock too


def test_pack_and_prune_hold_their_folder(small_run, tmp_path):
    diffprune.select(small_run.scores, tmp_path / "kept.parquet", by="loss", keep=0.5)
    for name, call in (
        ("packed", lambda: diffprune.pack(small_run.images, tmp_path / "packed", shard_size=50)),
        ("pruned", lambda: diffprune.prune(tmp_path / "kept.parquet", small_run.shards, tmp_path / "pruned")),
    ):
        with folder_lock(tmp_path / name), pytest.raises(BusyError, match="is at work there"):
            call()
        call()
        assert not list((tmp_path / name).glob(".tmp-*"))


def test_training_holds_its_folder_and_draws_what_a_killed_run_did_not(small_run, tmp_path):
    config = load_config(None, "dit", DIT_OVERRIDES)
    run = tmp_path / "run"
    with folder_lock(run), pytest.raises(BusyError, match="is at work there"):
        diffprune.train_dit(config, small_run.latents, run)
    diffprune.train_dit(config, small_run.latents, run)
    plot = (run / "loss.png").read_bytes()
    (run / "loss.png").rename(run / ".tmp-loss.png")  # killed after the last checkpoint
    (run / ".tmp-step_00000009").mkdir()
    diffprune.train_dit(config, small_run.latents, run)
    assert (run / "loss.png").read_bytes() == plot
    assert not list(run.glob(".tmp-*"))


HOLDER = """
import sys, time
from diffprune.locks import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_holder(tmp_path):
    root = str(Path(__file__).parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=f"process {holder.pid} on "):
        stage(tmp_path / "out")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / LOCK_FILE).is_file()
    assert stage(tmp_path / "out")["samples"] == 21
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_many_that_come_and_go_never_hold_it_together(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 60)
    inside, most, held = [], [], []

    def come_and_go() -> None:
        for _ in range(30):
            with folder_lock(tmp_path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()
                held.append(1)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(held) == 120


def test_parts_run_at_once_into_one_folder(tmp_path):
    out, done = tmp_path / "out", []
    barrier = threading.Barrier(3, timeout=20)

    def part(number: int) -> None:
        first = []

        def work(stem, bar):
            if not first:
                first.append(stem)
                barrier.wait()  # all parts are at work
            return make_table(stem, [f"{stem}-{i}" for i in range(3)])

        done.append(stage(out, work, part=(number, 3)))

    threads = [threading.Thread(target=part, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result["shards"] for result in done) == [2, 2, 3]
    assert sum(result["samples"] for result in done) == 21
    stage(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert stage(out)["shards_done_before"] == 7  # the whole finds all of it done


@pytest.mark.parametrize("half_written", [True, False])
def test_a_part_begins_while_another_looks_at_the_folder(tmp_path, monkeypatch, half_written):
    out, begun = tmp_path / "out", []
    is_file = Path.is_file

    def slow(path):
        found = is_file(path)
        if path == out / "stage.json" and not begun:
            begun.append(path)
            if half_written:
                out.mkdir()
                (out / ".tmp-stage.json.1").touch()
            else:
                stage(out, part=(2, 3))
        return found

    monkeypatch.setattr(Path, "is_file", slow)
    assert stage(out, part=(1, 3))["shards"] == 2
    assert begun


def test_parts_that_overlap_are_told(tmp_path):
    out, told = tmp_path / "out", []

    def work(stem, bar):
        if stem == "s1" and not told:
            with pytest.raises(
                BusyError, match=f"shard s1 is being done by process {os.getpid()} on .*must not overlap"
            ):
                stage(out, part=(1, 3))  # s0 is done, s1 is being done
            told.append(stem)
        return make_table(stem, [stem])

    stage(out, work, part=(1, 2))
    assert told == ["s1"]
    with shard_claim(out, "s5"), pytest.raises(BusyError, match="shard s5"):
        stage(out, part=(2, 2))
    assert stage(out, part=(2, 2))["shards_done_before"] == 2  # s3, s4


def test_a_part_leaves_other_parts_half_written_files_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".tmp-s0.parquet").write_bytes(b"of a part that was killed")
    (out / ".tmp-s6.parquet").write_bytes(b"of one that is at work")
    stage(out, part=(1, 2))
    assert [path.name for path in out.glob(".tmp-*")] == [".tmp-s6.parquet"]
    stage(out, part=(2, 2))
    assert not list(out.glob(".tmp-*"))


def test_the_whole_removes_the_lock_of_a_part_that_was_killed_once_its_shard_was_done(tmp_path):
    out = tmp_path / "out"
    stage(out, part=(1, 2))
    (out / f"{LOCK_FILE}-s1").write_text("process 7 on a node\n")
    assert stage(out, part=(1, 2))["shards_done_before"] == 3
    with folder_lock(out, shared=True), shard_claim(out, "s5"):  # of a part that is at work
        stage(out, part=(1, 2))
        assert {path.name for path in out.glob(".tmp-*")} == {LOCK_FILE, f"{LOCK_FILE}-s1", f"{LOCK_FILE}-s5"}
    stage(out)
    assert not list(out.glob(".tmp-*"))


def test_parts_are_read_strictly_and_cover_all():
    assert parse_part("3/64") == (3, 64) and parse_part(None) is None
    for text in ("0/4", "5/4", "3", "a/b", "1/0", "-1/4", "1/4 "):
        with pytest.raises(InputError, match="part: expected I/N with I from 1 to N"):
            parse_part(text)
    for parts in (1, 2, 3, 7, 9):
        shares = [Engine(part=(i, parts)).whole(SHARDS) for i in range(1, parts + 1)]
        assert [stem for share in shares for stem in share] == SHARDS
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_score_in_parts(small_run, tmp_path):
    options = {"methods": ("loss", "monotonicity"), "device": "cpu"}
    run = (small_run.latents, small_run.surrogate)
    for part in ("2/2", "1/2"):
        diffprune.score(*run, tmp_path / "parts", part=part, **options)
    diffprune.score(*run, tmp_path / "whole", **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    for more in ({"methods": "moso"}, {"normalise_t": True}, {"batch_size": "auto"}):
        with pytest.raises(InputError, match="a part sees its own samples only"):
            diffprune.score(*run, tmp_path / "x", part="1/2", **{**options, **more})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    stage(tmp_path / "out", part=(1, 2))
    os.chmod(tmp_path / "out", 0o500)
    with pytest.raises(InputError, match="out: cannot be written to"):
        stage(tmp_path / "out")
    os.chmod(tmp_path / "out", 0o700)
    assert stage(tmp_path / "out")["shards_done_before"] == 3


def test_a_file_system_that_is_read_only(tmp_path, monkeypatch):
    """As it looks from here: also where tests run as root."""
    stage(tmp_path / "out", part=(1, 2))
    real = os.open

    def read_only(path, flags, *more, **options):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(InputError, match=r"out: cannot be written to \(Read-only file system\)"):
            stage(tmp_path / "out")
    assert stage(tmp_path / "out")["shards_done_before"] == 3


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="no locks on this file system"):
        stage(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    with folder_lock(tmp_path / "new" / "one"):
        pass
    assert not (tmp_path / "new" / "one").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder, found a file"), folder_lock(tmp_path / "file"):
        pass
    with pytest.raises(ResumeError):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("precious")
        stage(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
