"""``--workers``: the bytes of a run in one process; with a worker killed in its midst too."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest
from small_run import contents
from test_encoding import damage_image

import diffprune
from diffprune import image_maps
from diffprune.errors import DiskFullError, InputError
from diffprune.live_latents import LiveLatents

METHODS = ("loss", "el2n", "grand", "moso", "monotonicity", "random")


def test_pack_and_verify_are_as_in_one_process(small_run, tmp_path):
    diffprune.pack(small_run.images, tmp_path / "one", shard_size=17, resize=20)
    report = diffprune.pack(small_run.images, tmp_path / "three", shard_size=17, resize=20, workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert (report["written"], report["present"]) == (8, 0)
    key = damage_image(tmp_path / "three" / "images-000003.tar")
    one = diffprune.verify(tmp_path / "three", decode=True)
    assert diffprune.verify(tmp_path / "three", decode=True, workers=2) == one
    assert [entry["key"] for entry in one["damage"]] == [key]


def test_encode_is_as_in_one_process(small_run, tmp_path):
    diffprune.pack(small_run.images, tmp_path / "shards", shard_size=25)
    diffprune.encode(tmp_path / "shards", small_run.vqvae, tmp_path / "one", flip_twins=True)
    result = diffprune.encode(tmp_path / "shards", small_run.vqvae, tmp_path / "two", flip_twins=True, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (result["samples"], result["shards"], result["shards_done_before"]) == (120, 5, 0)


def test_score_is_as_in_one_process_though_a_worker_is_killed(small_run, tmp_path):
    options = {"methods": METHODS, "draws": 2, "normalise_t": True, "trials": 2, "batch_size": 16, "device": "cpu"}
    diffprune.score(small_run.latents, small_run.surrogate, tmp_path / "one", **options)
    killed = []

    def kill() -> None:
        """One of the workers, once the first gradient sums are there."""
        end = time.monotonic() + 60
        while time.monotonic() < end and not killed:
            if list((tmp_path / "two").glob("_partials/gradient-*/*")):
                path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
                for child in path.read_text().split():
                    if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                        os.kill(int(child), signal.SIGKILL)
                        killed.append(child)
                        return
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    result = diffprune.score(small_run.latents, small_run.surrogate, tmp_path / "two", workers=2, **options)
    thread.join()
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(killed) == 1
    assert (result["samples"], result["failed_in_scoring"]) == (120, 0)


def test_what_workers_are_sent_is_all_that_they_need(small_run, monkeypatch):
    live = LiveLatents(str(small_run.shards), small_run.vqvae, device="cpu", batch_size=7)
    for name in ("find_shards", "index_found"):  # a worker does not read all headers again
        monkeypatch.setattr(image_maps, name, lambda *_: {})
    sent = pickle.loads(pickle.dumps(live))
    assert sent.identities() == live.identities() and sent.samples == live.samples and sent.vqvae == live.vqvae
    assert (sent.metadata, sent.fingerprint, sent.stems) == (live.metadata, live.fingerprint, live.stems)
    assert sent.array(live.stems[2]).tobytes() == live.array(live.stems[2]).tobytes()


def test_what_a_worker_runs_into_is_told_as_in_one_process(small_run, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "model"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "model"), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "model" / "full_disk.py").write_text(
        "import errno, os\n\n"
        "calls = []\n"
        "def embed(images):\n    calls.append(1)\n"
        "    if len(calls) > 1:\n        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'there')\n"
        "    return images.float().flatten(1)\n"
        "embed.image_size = 4\n"
    )
    with pytest.raises(DiskFullError, match="0 of 3 shards are finished and kept"):
        diffprune.embed(small_run.shards, tmp_path / "full", model="full_disk:embed", workers=2, batch_size=20)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["stage.json"]
    for call in (
        lambda: diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "x", workers=0),
        lambda: diffprune.pack(small_run.images, tmp_path / "x", workers=0),
        lambda: diffprune.score(small_run.latents, small_run.surrogate, tmp_path / "x", workers=-1),
    ):
        with pytest.raises(InputError, match="workers: expected 1 or more"):
            call()
    assert not (tmp_path / "x").exists()
