"""Training takes latents, shards, pruned shards or a selection, and sees groups as often as it is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.cli.app import app
from diffprune.config import load_config
from diffprune.errors import InputError, ResumeError
from diffprune.shards import index_shard
from diffprune.tables import read_folder
from diffprune.training_order import BalancedOrder

DIT = ["model.input_size=4", "model.hidden_size=16", "model.depth=1", "train.batch_size=8", "train.device=cpu"]


def dit_config(*overrides: str):
    return load_config(None, "dit", [*DIT, "train.steps=3", *overrides])


def weights(report: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(report["checkpoint"]) / "model.safetensors")


def same(one: dict, two: dict) -> bool:
    return all(torch.equal(weights(two)[name], tensor) for name, tensor in weights(one).items())


def live(small_run, shards: Path | None = None) -> diffprune.LiveLatents:
    return diffprune.LiveLatents(str(shards or small_run.shards), small_run.vqvae, device="cpu")


@pytest.fixture(scope="module")
def kept(small_run, tmp_path_factory) -> Path:
    """Every third sample."""
    path = tmp_path_factory.mktemp("kept") / "kept.parquet"
    table = ArrayFolder(small_run.latents).load()[0].select(["key", "shard", "offset", "size"])
    pq.write_table(table.take(list(range(0, 120, 3))), path)
    return path


def test_shards_train_as_their_latents_do(small_run, tmp_path):
    folder = diffprune.train_dit(dit_config(), small_run.latents, tmp_path / "folder")
    shards = diffprune.train_dit(dit_config(), live(small_run), tmp_path / "shards")
    assert (shards["images"], shards["failed"]) == (120, 0) and same(folder, shards)
    # A run begun on the one goes on on the other.
    more = dit_config("train.steps=5")
    assert same(
        diffprune.train_dit(more, small_run.latents, tmp_path / "shards"),
        diffprune.train_dit(more, live(small_run), tmp_path / "folder"),
    )


def test_a_selection_is_trained_on_from_latents_shards_and_pruned_shards(small_run, kept, tmp_path, monkeypatch):
    from diffprune import decode

    diffprune.prune(kept, small_run.shards, tmp_path / "pruned", shard_size=15)
    read, real = [], decode.read_image
    monkeypatch.setattr(decode, "read_image", lambda reader, sample: (read.append(sample.key), real(reader, sample))[1])
    tables = [ArrayFolder(small_run.latents).load(kept, np.float16)]
    assert not read
    tables.append(live(small_run).load(kept)[:2])
    wanted = pq.read_table(kept)["key"].to_pylist()
    assert sorted(read) == sorted(wanted)  # and no other image is looked at
    tables.append(live(small_run, tmp_path / "pruned").load()[:2])
    for table, values in tables:
        assert table["key"].to_pylist() == wanted and values.dtype == np.float16
        # Other images share a batch: rounding.
        np.testing.assert_allclose(values.astype(float), tables[0][1].astype(float), rtol=2e-3, atol=2e-3)
    reports = [
        diffprune.train_dit(dit_config(), small_run.latents, tmp_path / "folder", kept=kept),
        diffprune.train_dit(dit_config(), live(small_run), tmp_path / "shards", kept=kept),
        diffprune.train_dit(dit_config(), live(small_run, tmp_path / "pruned"), tmp_path / "pruned-run"),
    ]
    assert [report["images"] for report in reports] == [40] * 3
    for report in reports[1:]:
        assert report["loss"] == pytest.approx(reports[0]["loss"], rel=1e-3)
        for name, tensor in weights(reports[0]).items():
            torch.testing.assert_close(weights(report)[name], tensor, rtol=0.02, atol=3e-3)


def test_mirrored_images_are_encoded_too(small_run, tmp_path):
    diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "twins", flip_twins=True)
    config = dit_config("train.flip=true")
    folder = diffprune.train_dit(config, tmp_path / "twins", tmp_path / "folder")
    assert same(folder, diffprune.train_dit(config, live(small_run), tmp_path / "shards"))


def test_a_damaged_image_is_left_out_and_one_that_was_selected_is_told(small_run, kept, tmp_path):
    shards = Path(shutil.copytree(small_run.shards, tmp_path / "shards"))
    shard = sorted(shards.glob("*.tar"))[0]
    sample = index_shard(shard).samples[3]
    data = bytearray(shard.read_bytes())
    image = sample.images()[0]
    data[image.data_offset : image.data_offset + image.size] = bytes(image.size)
    shard.write_bytes(data)
    report = diffprune.train_dit(dit_config(), live(small_run, shards), tmp_path / "run")
    assert (report["images"], report["failed"]) == (119, 1)
    with pytest.raises(InputError, match=f"kept.parquet: 1 of 40 keys, '{sample.key}' first, .*cannot be decoded"):
        diffprune.train_dit(dit_config(), live(small_run, shards), tmp_path / "kept", kept=kept)


def test_shards_that_cannot_be_trained_on_are_told(small_run, tmp_path):
    shards = Path(shutil.copytree(small_run.shards, tmp_path / "shards"))
    first = sorted(shards.glob("*.tar"))[0]
    shutil.copy(first, shards / "again.tar")
    key = index_shard(first).samples[0].key
    with pytest.raises(InputError, match=f"key '{key}' is also in .*again.tar"):
        diffprune.train_dit(dit_config(), live(small_run, shards), tmp_path / "run")
    with pytest.raises(InputError, match=r"shards: expected latents \[2, 6, 6\] .*, found \[2, 4, 4\]"):
        diffprune.train_dit(dit_config("model.input_size=6"), live(small_run), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_on_shards(small_run, tmp_path):
    options = [f"--set={override}" for override in [*DIT, "train.steps=2"]]
    run = ["train", "dit", str(small_run.shards), "--vqvae", str(small_run.vqvae), "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*run, *options, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == 120
    by = ["--oversample-balanced", "label", "--group-weights", "0=2,*=1"]
    result = CliRunner().invoke(app, [*run[:-1], str(tmp_path / "weighted"), *options, *by, "--json"])
    assert result.exit_code == 0, result.output


# Groups by weight


def test_a_weighted_order_sees_groups_in_proportion():
    groups = [3] * 50 + [7] * 5 + [0] * 2 + [9] * 3
    order = BalancedOrder(groups, seed=4, weights={3: 1, 7: 2, 0: 3, 9: 0})
    rows = torch.cat([order.batch(20, step) for step in range(30)])  # 10 epochs of 60 places
    counts = torch.bincount(rows, minlength=60).split([50, 5, 2, 3])
    assert [int(part.sum()) for part in counts] == [100, 200, 300, 0]
    for part in counts[:3]:
        assert part.max() - part.min() <= 1
    rare = BalancedOrder([0] * 99 + [1], seed=4, weights={0: 1000, 1: 1})
    assert int((rare.batch(100, 0) == 99).sum()) == 1  # once per epoch at least


@pytest.mark.parametrize("by", ["label", "cluster"])
def test_groups_are_trained_on_by_weight(small_run, tmp_path, by, monkeypatch):
    from diffprune import dit_objective

    table, latents = ArrayFolder(small_run.latents).load()
    rows = {row.tobytes(): number for number, row in enumerate(latents)}
    groups, option = table["label"].to_pylist(), "label"
    if by == "cluster":
        found = read_folder(small_run.clusters, ["key", "cluster"]).to_pydict()
        clusters = dict(zip(found["key"], found["cluster"], strict=True))
        groups, option = [clusters[key] for key in table["key"].to_pylist()], small_run.clusters
    seen, real = [], dit_objective.interpolate
    monkeypatch.setattr(dit_objective, "interpolate", lambda x1, x0, t: (seen.extend(x1.clone()), real(x1, x0, t))[1])
    (tmp_path / "weights.json").write_text('{"1": 3, "2": 1}')
    config = dit_config("train.steps=1", "train.batch_size=120")
    options = {"oversample_balanced": option, "group_weights": tmp_path / "weights.json"}
    diffprune.train_dit(config, small_run.latents, tmp_path / "run", **options)
    counts = np.unique([groups[rows[row.numpy().tobytes()]] for row in seen], return_counts=True)
    assert [part.tolist() for part in counts] == [[1, 2], [90, 30]]
    with pytest.raises(ResumeError, match=r"data.group_weights: "):
        more = dit_config("train.steps=2", "train.batch_size=120")
        diffprune.train_dit(more, small_run.latents, tmp_path / "run", **{**options, "group_weights": "1=1,2=1"})


@pytest.mark.parametrize(
    "given, message",
    [
        ("77=2", "group_weights: no group '77' among the samples; there are 10: 0, 1, 2"),
        ("0=0", "group_weights: all are 0, expected one above it"),
        ("0=x", "group '0': expected a number of samples, 0 or more, got 'x'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(small_run, tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        diffprune.train_dit(
            dit_config(), small_run.latents, tmp_path / "run", oversample_balanced="label", group_weights=given
        )
    with pytest.raises(InputError, match="group_weights: of which groups"):
        diffprune.train_dit(dit_config(), small_run.latents, tmp_path / "run", group_weights=given)
    assert not (tmp_path / "run").exists()
