"""Several processes, started by torchrun and talking through gloo, train as one does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_encoding import damage_image

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.checkpoints import load_dit, read_state
from diffprune.config import load_config
from diffprune.errors import InputError
from diffprune.ranks import Ranks
from diffprune.training_order import batch_rows

DIT = ["model.input_size=4", "model.hidden_size=16", "model.depth=2", "train.batch_size=12", "train.log_every=1"]
VQVAE = ["model.image_size=16", "model.base_channels=4", "model.codebook_size=16", "train.batch_size=12"]
VQVAE += ["train.log_every=1", "train.lr=1e-5"]  # its biases without effect follow rounding, by lr a step
ADVERSARY = ["loss.adversarial_weight=0.5", "loss.discriminator_channels=4", "loss.discriminator_layers=2"]
ADVERSARY += ["loss.pixel=l1", "train.steps=3"]
FSDP = ["train.sharding=fsdp"]
COMPILED = ["train.compile=true"]
RECOMPUTED = "train.activation_checkpointing=true"
# Sums of the same numbers in another order: float32 rounding, which training carries on.
RELATIVE, ABSOLUTE = 1e-4, 1e-4


def torchrun(folder: Path, processes: int, *requests: dict, fails: bool = False) -> str:
    """Run tests/ranks_worker.py on these requests, one after the other; what they wrote to stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(json.dumps(requests))
    root = Path(__file__).resolve().parents[1]
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [sys.executable, *command, str(root / "tests" / "ranks_worker.py"), str(folder / "request.json")],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
    return result.stderr


def dit(small_run, out: Path, *overrides: str, **more) -> dict:
    every = [*DIT, "train.device=cpu", *overrides]
    return {"kind": "dit", "overrides": every, "data": str(small_run.latents), "out": str(out), **more}


def vqvae(small_run, out: Path, *overrides: str, **more) -> dict:
    every = [*VQVAE, "train.device=cpu", *overrides]
    return {"kind": "vqvae", "overrides": every, "data": str(small_run.shards), "out": str(out), **more}


def curve(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("images_per_second", "mfu")} for line in lines]


def weights(run: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"step_{step:08d}" / f"{file}.safetensors")


def assert_same(run: Path, other: Path, step: int, file: str = "model") -> None:
    assert [line["step"] for line in curve(run)] == [line["step"] for line in curve(other)]
    for one, two in zip(curve(run), curve(other), strict=True):
        assert one == pytest.approx(two, rel=RELATIVE)
    found = weights(other, step, file)
    for name, expected in weights(run, step, file).items():
        torch.testing.assert_close(found[name], expected, rtol=RELATIVE, atol=ABSOLUTE, msg=name)


@pytest.fixture(scope="module")
def alone(small_run, tmp_path_factory) -> Path:
    """The same in this process."""
    root = tmp_path_factory.mktemp("alone")
    diffprune.train_dit(load_config(None, "dit", [*DIT, "train.steps=8"]), small_run.latents, root / "dit")
    diffprune.train_vqvae(load_config(None, "vqvae", [*VQVAE, "train.steps=4"]), small_run.shards, root / "vqvae")
    diffprune.train_vqvae(load_config(None, "vqvae", [*VQVAE, *ADVERSARY]), small_run.shards, root / "adversary")
    return root


def test_two_and_four_processes_draw_the_same_curve_and_go_on_from_each_other(small_run, alone, tmp_path):
    half = dit(small_run, tmp_path / "mixed", "train.steps=4")
    decoded = {"decode_with": str(small_run.vqvae)}
    torchrun(
        tmp_path / "two",
        2,
        dit(small_run, tmp_path / "two", "train.steps=8", "train.accumulate=2", slow_disk=1.0),
        dit(small_run, tmp_path / "two-files", "train.steps=8", "train.accumulate=2", streamed=True),  # reads rows
        vqvae(small_run, tmp_path / "two-vqvae", "train.steps=4"),
        vqvae(small_run, tmp_path / "two-adversary", *ADVERSARY, streamed=True),  # each decodes its share of the shards
        half,
        dit(small_run, tmp_path / "sharded", *FSDP, "train.steps=8", "train.sample_every=8", **decoded),
        dit(small_run, tmp_path / "by-parts", *FSDP, "train.steps=4", "train.accumulate=2", RECOMPUTED),
        dit(small_run, tmp_path / "alone-at-last", *FSDP, "train.steps=4"),
        dit(small_run, tmp_path / "compiled", *COMPILED, "train.steps=8"),
        dit(small_run, tmp_path / "sharded-compiled", *FSDP, *COMPILED, RECOMPUTED, "train.steps=8"),
        dit(small_run, tmp_path / "broken", *FSDP, "train.steps=8", "train.checkpoint_every=2", poisoned_step=3),
    )
    torchrun(
        tmp_path / "four",
        4,
        dit(small_run, tmp_path / "four", "train.steps=8"),
        dit(small_run, tmp_path / "mixed", "train.steps=8"),  # resumes what two began
        dit(small_run, tmp_path / "by-parts", "train.steps=8"),
        dit(small_run, tmp_path / "poisoned", "train.steps=8", "train.checkpoint_every=2", poisoned_step=3),
        dit(small_run, tmp_path / "uneven", "train.batch_size=10"),
    )
    # What two processes began with a part of the weights each, one ends with all of them.
    last = load_config(None, "dit", [*DIT, "train.steps=8", "train.device=cpu"])
    diffprune.train_dit(last, small_run.latents, tmp_path / "alone-at-last")
    for run in ("two", "four", "mixed", "sharded", "compiled", "sharded-compiled", "by-parts", "alone-at-last"):
        assert_same(alone / "dit", tmp_path / run, 8)
        load_dit(tmp_path / run)
    grid = {"count": 40, "grid": tmp_path / "grid.png", "device": "cpu"}
    diffprune.sample(tmp_path / "sharded", small_run.vqvae, None, **grid)
    found = (tmp_path / "sharded" / "samples" / "step_00000008.png").read_bytes()
    assert found == (tmp_path / "grid.png").read_bytes()
    for file in ("model", "optimizer"):
        files = [tmp_path / run / "step_00000008" / f"{file}.safetensors" for run in ("two", "two-files")]
        assert files[0].read_bytes() == files[1].read_bytes()
    reports = [json.loads((tmp_path / run / "report-1.json").read_text()) for run in ("two", "two-files")]
    assert [report["latents"] for report in reports] == ["in memory", "in files"]
    assert_same(alone / "vqvae", tmp_path / "two-vqvae", 4)
    assert_same(alone / "adversary", tmp_path / "two-adversary", 3)
    assert_same(alone / "adversary", tmp_path / "two-adversary", 3, "discriminator")
    for run, processes in (("two", 2), ("four", 4), ("mixed", 4), ("sharded", 2), ("by-parts", 4)):
        reports = [json.loads((tmp_path / run / f"report-{rank}.json").read_text()) for rank in range(processes)]
        assert all(report["processes"] == processes for report in reports)
        assert all(report["is_there"] for report in reports)  # for each when it returned, also on a slow disk
        assert len({report["checkpoint"] for report in reports}) == len({report["loss"] for report in reports}) == 1
    first = json.loads((tmp_path / "mixed" / "report-0.json").read_text())
    assert first["first_step"] == 4

    # One process's NaN stops all of them, and each names the samples, which are that process's.
    keys = ArrayFolder(small_run.latents).load()[0]["key"].to_pylist()
    bad = [keys[row] for row in batch_rows(120, 12, 0, 2)[9:]]
    for rank in range(4):
        error = json.loads((tmp_path / "poisoned" / f"report-{rank}.json").read_text())["error"]
        assert f"step 3: the loss is not finite for 3 of 12 samples, keys {', '.join(bad)};" in error
    for run in ("poisoned", "broken"):
        assert json.loads((tmp_path / run / "stopped.json").read_text())["last_checkpoint"].endswith("_00000002")
    error = json.loads((tmp_path / "uneven" / "report-3.json").read_text())["error"]
    assert error == "train.batch_size: expected a multiple of the 4 processes, got 10"


def test_each_process_encodes_its_share_of_images(small_run, tmp_path):
    shards = Path(shutil.copytree(small_run.shards, tmp_path / "shards"))
    key = damage_image(sorted(shards.glob("*.tar"))[1])
    table = ArrayFolder(small_run.latents).load()[0].select(["key", "shard", "offset", "size"])
    pq.write_table(table.filter(pc.not_equal(table["key"], key)).take(list(range(7, 12))), tmp_path / "kept.parquet")
    runs = {
        "all": (120, ["train.flip=true"], {}),
        "kept": (5, [], {"kept": str(tmp_path / "kept.parquet")}),  # one batch: all but one process encode nothing
    }
    for run, (_, more, options) in runs.items():
        source = diffprune.LiveLatents(shards, small_run.vqvae, batch_size=8, device="cpu")
        config = load_config(None, "dit", [*DIT, "train.steps=4", "train.device=cpu", *more])
        diffprune.train_dit(config, source, tmp_path / "one" / run, **options)
    live = {"vqvae": str(small_run.vqvae), "data": str(shards)}
    refused = [
        {**dit(small_run, tmp_path / "two" / "other"), **live, "data_of_last": str(small_run.shards)},
        {**dit(small_run, tmp_path / "two" / "narrow"), **live, "streamed": True},  # no memory is free
    ]
    for name, processes in (("two", 2), ("four", 4)):
        requests = [
            {**dit(small_run, tmp_path / name / run, "train.steps=4", *more), **live, **options}
            for run, (_, more, options) in runs.items()
        ]
        torchrun(tmp_path / name, processes, *requests, *(refused if name == "two" else []))
        for run, (images, _, _) in runs.items():
            assert_same(tmp_path / "one" / run, tmp_path / name / run, 4)
            # To the bit the same latents.
            states = [read_state(tmp_path / folder / run / "step_00000004") for folder in ("one", name)]
            assert states[0]["data"] == states[1]["data"]
            reports = [json.loads((tmp_path / name / run / f"report-{n}.json").read_text()) for n in range(processes)]
            assert {report["failed"] for report in reports if run == "all"} <= {1}
            assert sum(report["encoded"] for report in reports) == images
            assert max(report["encoded"] for report in reports) <= images // processes + 8
    for run, message in (("other", "see different samples there"), ("narrow", "0.0 GB free; `diffprune encode`")):
        for rank in range(2):
            assert message in json.loads((tmp_path / "two" / run / f"report-{rank}.json").read_text())["error"]
    # What goes wrong with one process's images ends all, and is told.
    request = {**dit(small_run, tmp_path / "gone"), "vqvae": str(small_run.vqvae), "data": str(shards), "gone": True}
    assert "the last process's images are gone" in torchrun(tmp_path / "gone", 2, request, fails=True)


def test_one_process_of_torchrun_is_a_run_without_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    from diffprune.ranks import training_ranks

    ranks, device = training_ranks("cpu", 7)
    assert ranks == Ranks(0, 1) and device.type == "cpu"
    assert [Ranks(rank, 3).share(12) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_an_environment_that_torchrun_would_not_make_is_told(name, monkeypatch):
    from diffprune.rank_talk import RankTalk, environment_number

    monkeypatch.setenv(name, "two")
    with pytest.raises(InputError, match=f"environment variable {name}: expected a number, as torchrun sets it"):
        environment_number(name, 1)
    if name != "LOCAL_WORLD_SIZE":
        with pytest.raises(InputError, match=name):
            RankTalk.of_torchrun()
