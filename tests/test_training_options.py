"""What makes training fast, or draws otherwise, changes what it should and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.checkpoints import load_dit, load_vqvae
from diffprune.config import DitConfig, DitRun, TrainConfig, from_dict, load_config, to_dict
from diffprune.decode import load_images
from diffprune.errors import InputError, ResumeError
from diffprune.models.dit import DiT
from diffprune.models.positions import rotary_turns, rotate
from diffprune.models.vqvae import VQVAE
from diffprune.tables import read_folder
from diffprune.throughput import duration, matmul_rate, step_operations
from diffprune.training_order import BalancedOrder

DIT = ["model.input_size=4", "model.hidden_size=16", "model.depth=2", "train.batch_size=7", "train.log_every=1"]
VQVAE_RUN = ["model.image_size=16", "model.base_channels=4", "model.codebook_size=16", "train.batch_size=7"]


def train(small_run, out: Path, *overrides: str, kind: str = "dit", **options) -> dict[str, torch.Tensor]:
    """The weights after training."""
    common = ["train.steps=3", "train.device=cpu", *overrides]
    if kind == "dit":
        report = diffprune.train_dit(load_config(None, "dit", DIT + common), small_run.latents, out, **options)
    else:
        report = diffprune.train_vqvae(load_config(None, "vqvae", VQVAE_RUN + common), small_run.shards, out)
    return load_file(Path(report["checkpoint"]) / "model.safetensors")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def largest_difference(one: dict, two: dict) -> float:
    assert sorted(one) == sorted(two)
    return max((one[name] - two[name]).abs().max().item() for name in one)


# The same step by other means


@pytest.mark.parametrize("kind", ["dit", "vqvae"])
def test_accumulating_gives_the_same_step_but_for_rounding(small_run, tmp_path, kind):
    """Seven samples in three uneven parts; the codebook too must move by the whole batch."""
    # A VQ-VAE has biases without effect, whose gradient is nothing but rounding: AdamW moves them by lr either way.
    lr, tolerance = ("train.lr=1e-3", 2e-5) if kind == "dit" else ("train.lr=1e-5", 1e-4)
    whole = train(small_run, tmp_path / "whole", lr, kind=kind)
    for parts in (3, 7):
        other = train(small_run, tmp_path / f"parts{parts}", lr, f"train.accumulate={parts}", kind=kind)
        assert 0 < largest_difference(whole, other) < tolerance
    log = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("whole", "parts3")]
    for name in set(log[0]) - {"images_per_second", "mfu"}:
        assert log[1][name] == pytest.approx(log[0][name], rel=1e-4), name


def test_activation_checkpointing_gives_the_same_bytes_and_recomputes(small_run, tmp_path, monkeypatch):
    from diffprune.models import dit

    calls, real = [], dit.Mlp.forward
    monkeypatch.setattr(dit.Mlp, "forward", lambda self, x: calls.append(x.is_meta) or real(self, x))
    plain = train(small_run, tmp_path / "plain")
    count = calls.count(False)
    again = train(small_run, tmp_path / "again", "train.activation_checkpointing=true")
    assert largest_difference(plain, again) == 0
    assert calls.count(False) - count == 2 * count


def test_compiled_blocks_give_the_same_step_but_for_rounding(small_run, tmp_path, monkeypatch):
    """All but the last stage of the compiler, which takes half a minute here; benchmarks/bench_training.py has it."""
    compile_block, backends = DiT.compile_blocks, []
    monkeypatch.setattr(DiT, "compile_blocks", lambda self: backends.append(1) or compile_block(self, "aot_eager"))
    plain = train(small_run, tmp_path / "plain")
    compiled = train(small_run, tmp_path / "compiled", "train.compile=true")
    assert backends and largest_difference(plain, compiled) < 2e-5  # and the names are the same
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_a_run_goes_on_by_other_means(small_run, tmp_path):
    whole = train(small_run, tmp_path / "whole", "train.steps=6")
    train(small_run, tmp_path / "parts")
    rest = train(
        small_run, tmp_path / "parts", "train.steps=6", "train.accumulate=2", "train.activation_checkpointing=true"
    )
    assert largest_difference(whole, rest) < 5e-5
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize("kind", ["dit", "vqvae"])
def test_checkpoints_made_before_these_options_go_on_with_the_same_bytes(small_run, tmp_path, kind):
    """Their config lacks the fields: they stand for what was done then."""
    whole = train(small_run, tmp_path / "whole", "train.steps=6", kind=kind)
    train(small_run, tmp_path / "old", kind=kind)
    path = tmp_path / "old" / "step_00000003" / "state.json"
    state = json.loads(path.read_text())
    added = ("accumulate", "activation_checkpointing", "compile", "timesteps", "flip", "explosion_factor")
    for name in (*added, "noise", "ops", "sharding", "sample_every", "tensorboard"):
        del state["config"]["train"][name]
    for name in ("qk_norm", "rope") if kind == "dit" else ("normalize_codes",):
        del state["config"]["model"][name]
    path.write_text(json.dumps(state))
    if kind == "vqvae":
        load_vqvae(path.parent)
    assert largest_difference(whole, train(small_run, tmp_path / "old", "train.steps=6", kind=kind)) == 0
    if kind == "dit":
        with pytest.raises(ResumeError, match=r"train.timesteps: 'uniform' there, 'lognormal' now"):
            train(small_run, tmp_path / "old", "train.steps=9", "train.timesteps=lognormal")
    run = to_dict(DitRun())
    del run["train"]["seed"]
    with pytest.raises(InputError, match=r"state.json: train.seed is missing"):
        from_dict("dit", run, "state.json")


# What is drawn


def test_lognormal_times_are_logistic_of_normal(small_run, tmp_path, monkeypatch):
    seen, real = [], DiT.forward
    monkeypatch.setattr(
        DiT, "forward", lambda self, x, t, y: (None if t.is_meta else seen.append(t), real(self, x, t, y))[1]
    )
    train(small_run, tmp_path / "run", "train.timesteps=lognormal", "train.steps=2", "train.batch_size=500")
    z = torch.cat(seen).double().logit()
    assert len(z) == 1000
    assert abs(z.mean().item()) < 0.12 and abs(z.std().item() - 1) < 0.1
    assert abs((z.abs() < 0.6745).double().mean().item() - 0.5) < 0.06  # the normal's quartiles


@pytest.fixture(scope="module")
def twins(small_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("twins") / "latents"
    diffprune.encode(small_run.shards, small_run.vqvae, out, flip_twins=True, batch_size=16)
    return out


def test_twins_are_the_latents_of_mirrored_images(small_run, twins):
    table, latents = ArrayFolder(twins).load()
    _, plain = ArrayFolder(small_run.latents).load()
    assert np.array_equal(latents, plain) and ArrayFolder(twins).metadata["shape"] == [2, 4, 4]
    _, images = load_images(small_run.shards, size=16, channels=1)
    model, _ = load_vqvae(small_run.vqvae)
    with torch.inference_mode():
        mirrored = model.encode(torch.from_numpy(images[:, :, :, ::-1].copy()).float() / 127.5 - 1).numpy()
    found = ArrayFolder(twins).load_twins()
    np.testing.assert_allclose(found, mirrored, atol=2e-3, rtol=1e-3)
    assert not np.array_equal(found, latents) and len(found) == table.num_rows


def test_flip_takes_the_twin_half_of_the_time(small_run, twins, tmp_path, monkeypatch):
    from diffprune import dit_objective

    seen, real = [], dit_objective.interpolate
    monkeypatch.setattr(dit_objective, "interpolate", lambda x1, x0, t: (seen.append(x1.clone()), real(x1, x0, t))[1])
    config = load_config(None, "dit", [*DIT, "train.flip=true", "train.batch_size=120", "train.steps=2"])
    diffprune.train_dit(config, twins, tmp_path / "run")
    folder = ArrayFolder(twins)
    rows = {"plain": folder.load()[1], "twin": folder.load_twins()}
    origin = {row.tobytes(): (name, number) for name, values in rows.items() for number, row in enumerate(values)}
    taken = [[origin[row.numpy().tobytes()] for row in batch] for batch in seen]
    for epoch in taken:  # each sample once, as itself or as its twin
        assert sorted(number for _, number in epoch) == list(range(120))
        assert 40 < sum(name == "twin" for name, _ in epoch) < 80
    assert dict(map(reversed, taken[0])) != dict(map(reversed, taken[1]))
    with pytest.raises(
        InputError, match=r"flip.npy: no such file; make the latents with `diffprune encode --flip-twins`"
    ):
        diffprune.train_dit(config, small_run.latents, tmp_path / "without")


def test_a_balanced_order_sees_each_group_equally_often():
    groups = [3] * 50 + [7] * 5 + [0] * 2
    order = BalancedOrder(groups, seed=4)
    rows = torch.cat([order.batch(19, step) for step in range(30)])  # 10 epochs of 57 places, 19 for each group
    counts = torch.bincount(rows, minlength=57)
    assert [int(part.sum()) for part in counts.split([50, 5, 2])] == [190, 190, 190]
    for part in counts.split([50, 5, 2]):  # and within a group each row equally often
        assert part.max() - part.min() <= 1
    assert torch.equal(order.batch(19, 7), BalancedOrder(groups, seed=4).batch(19, 7))
    assert not torch.equal(order.batch(19, 7), BalancedOrder(groups, seed=5).batch(19, 7))


@pytest.mark.parametrize("by", ["label", "cluster"])
def test_oversampling_balances_what_is_trained_on(small_run, tmp_path, by, monkeypatch):
    from diffprune import dit_objective

    table, latents = ArrayFolder(small_run.latents).load()
    rows = {row.tobytes(): number for number, row in enumerate(latents)}
    if by == "label":
        groups, option = table["label"].to_pylist(), "label"
    else:
        clusters = read_folder(small_run.clusters, ["key", "cluster"]).to_pydict()
        found = dict(zip(clusters["key"], clusters["cluster"], strict=True))
        groups, option = [found[key] for key in table["key"].to_pylist()], small_run.clusters
    seen, real = [], dit_objective.interpolate
    monkeypatch.setattr(dit_objective, "interpolate", lambda x1, x0, t: (seen.extend(x1.clone()), real(x1, x0, t))[1])
    places = -(-120 // len(set(groups)))
    every = ["train.steps=1", f"train.batch_size={places * len(set(groups))}"]
    train(small_run, tmp_path / "run", *every, oversample_balanced=option)
    counts = np.unique([groups[rows[row.numpy().tobytes()]] for row in seen], return_counts=True)[1]
    assert counts.tolist() == [places] * len(set(groups))
    with pytest.raises(ResumeError, match=r"data.balanced_by: "):
        train(small_run, tmp_path / "run", *every[1:], "train.steps=2")


def test_a_sample_without_a_cluster_is_told(small_run, tmp_path):
    clusters = Path(shutil.copytree(small_run.clusters, tmp_path / "clusters"))
    stage = json.loads((clusters / "stage.json").read_text())
    gone = stage["shards"].pop()
    (clusters / "stage.json").write_text(json.dumps(stage))
    key = ArrayFolder(small_run.latents).table(gone)["key"][0].as_py()
    with pytest.raises(InputError, match=f"clusters: key '{key}': expected a cluster to balance by, found none"):
        train(small_run, tmp_path / "run", oversample_balanced=clusters)


# Where it starts


def test_training_starts_from_a_published_state_dict(small_run, tmp_path):
    config = load_config(None, "dit", DIT).model
    start = DiT(**asdict(config), seed=77)
    torch.save({"ema": start.state_dict(), "opt": {}}, tmp_path / "published.pt")
    save_file({name: value.half() for name, value in start.state_dict().items()}, tmp_path / "half.safetensors")
    tiny = ["train.lr=1e-12", "train.steps=1"]
    found = train(small_run, tmp_path / "pt", *tiny, start_from=tmp_path / "published.pt")
    assert largest_difference(found, start.state_dict()) < 1e-7
    found = train(small_run, tmp_path / "half", *tiny, start_from=tmp_path / "half.safetensors")
    assert 0 < largest_difference(found, start.state_dict()) < 1e-3
    averaged = load_dit(tmp_path / "pt", "ema")[0].state_dict()
    assert largest_difference(averaged, start.state_dict()) < 1e-7
    with pytest.raises(ResumeError, match=r"data.start_sha256: '[0-9a-f]{64}' there, None now"):
        train(small_run, tmp_path / "pt", "train.lr=1e-12", "train.steps=2")
    with pytest.raises(InputError, match=r"published.pt: tensor 'blocks.2.attn.qkv.weight' is missing"):
        train(small_run, tmp_path / "deep", "model.depth=3", start_from=tmp_path / "published.pt")


def test_training_starts_from_another_run_on_the_same_latents(small_run, tmp_path):
    train(small_run, tmp_path / "first", "train.lr=0.01")
    found = train(small_run, tmp_path / "next", "train.lr=1e-12", "train.steps=1", start_from=tmp_path / "first")
    assert largest_difference(found, load_dit(tmp_path / "first", "ema")[0].state_dict()) < 1e-7
    latents = Path(shutil.copytree(small_run.latents, tmp_path / "latents"))
    stage = json.loads((latents / "stage.json").read_text())
    (latents / "stage.json").write_text(json.dumps(stage).replace('"latent_scale": ', '"latent_scale": 1'))
    config = load_config(None, "dit", DIT)
    with pytest.raises(
        InputError, match=r"first/step_00000003: made on latents of another VQ-VAE: latent_scale .* now"
    ):
        diffprune.train_dit(config, latents, tmp_path / "other", start_from=tmp_path / "first")


@pytest.mark.parametrize(("name", "value"), [("num_heads", 4), ("time_scale", 1.0), ("rope", True)])
def test_weights_that_fit_another_model_are_no_start(small_run, tmp_path, name, value):
    train(small_run, tmp_path / "first", "train.steps=1")
    with pytest.raises(InputError, match=rf"step_00000001: model.{name} is .* there, {value} now"):
        start = {"start_from": tmp_path / "first"}
        train(small_run, tmp_path / "next", "train.steps=1", f"model.{name}={str(value).lower()}", **start)


# QK-norm and RoPE


def test_rotation_keeps_lengths_and_makes_products_depend_on_distance_alone():
    side, size = 5, 16
    cosine, sine = rotary_turns(side, size)
    x, y = torch.randn(2, 1, size, generator=torch.Generator().manual_seed(0)).double()
    turned_x = rotate(x.expand(side * side, -1), cosine.double(), sine.double())
    turned_y = rotate(y.expand(side * side, -1), cosine.double(), sine.double())
    torch.testing.assert_close(turned_x.norm(dim=1), x.norm().expand(side * side))
    products = (turned_x @ turned_y.T).view(side, side, side, side)  # rows and columns of both
    torch.testing.assert_close(products[0, 0, 2, 1], products[2, 3, 4, 4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(products[3, 1, 1, 2], products[4, 1, 2, 2], rtol=1e-6, atol=1e-6)
    assert (products[0, 0, 2, 1] - products[0, 0, 1, 2]).abs() > 1e-3  # rows are not columns
    assert (products[0, 0, 0, 1] - products[0, 0, 0, 2]).abs() > 1e-3


def test_qk_norm_and_rope_are_what_they_say(small_run, tmp_path):
    model = DiT(**asdict(DitConfig(hidden_size=16, num_heads=2, depth=1, qk_norm=True, rope=True)), seed=3)
    attention = model.blocks[0].attn
    assert tuple(attention.q_norm.weight.shape) == (8,)
    generator = torch.Generator().manual_seed(1)
    for parameter in attention.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, 16, 16, generator=generator)
    turns = rotary_turns(4, 8)
    query, key, value = attention.qkv(x).view(2, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    mean, var = query.mean(-1, keepdim=True), query.var(-1, keepdim=True, correction=0)
    query = (query - mean) / (var + 1e-6).sqrt() * attention.q_norm.weight + attention.q_norm.bias
    mean, var = key.mean(-1, keepdim=True), key.var(-1, keepdim=True, correction=0)
    key = (key - mean) / (var + 1e-6).sqrt() * attention.k_norm.weight + attention.k_norm.bias
    shares = (rotate(query, *turns) @ rotate(key, *turns).transpose(-1, -2) / 8**0.5).softmax(-1)
    expected = attention.proj((shares @ value).transpose(1, 2).reshape(2, 16, 16))
    torch.testing.assert_close(attention(x, turns), expected, atol=1e-5, rtol=1e-4)

    options = ["model.qk_norm=true", "model.rope=true", "train.steps=24", "train.lr=0.003"]
    train(small_run, tmp_path / "run", *options)
    assert np.mean(losses(tmp_path / "run")[-8:]) < 0.9 * np.mean(losses(tmp_path / "run")[:8])
    train(small_run, tmp_path / "low", *options, "train.steps=2", "train.precision=bfloat16")
    loaded, _ = load_dit(tmp_path / "run")
    assert loaded.config.rope and loaded.blocks[0].attn.k_norm.weight.ne(1).any()
    with pytest.raises(InputError, match="hidden_size: expected a multiple of 8 with rope, got 12"):
        DitConfig(hidden_size=12, num_heads=2, rope=True)
    without = {name for name in DiT(hidden_size=16, depth=1, num_heads=2).state_dict() if "norm" in name}
    assert not without  # as published


# What is printed


def test_operations_are_three_forwards(small_run, tmp_path):
    hidden, tokens, channels, depth, inner = 16, 4, 2, 2, 64
    block = 2 * tokens * hidden * (3 * hidden + hidden + 2 * inner) + 4 * tokens**2 * hidden + 2 * hidden * 6 * hidden
    ends = 2 * tokens * 4 * channels * hidden * 2 + 2 * hidden * 2 * hidden + 2 * hidden * (256 + hidden)
    report = diffprune.train_dit(load_config(None, "dit", DIT), small_run.latents, tmp_path / "run", dry_run=True)
    assert report["operations_per_image"] == 3 * (depth * block + ends)
    assert step_operations(lambda: torch.mm(torch.zeros(3, 5), torch.zeros(5, 7))) == 3 * 2 * 3 * 5 * 7


def test_mfu_is_the_share_of_the_matmul_rate(small_run, tmp_path):
    config = load_config(None, "dit", [*DIT, "train.steps=5", "train.batch_size=32", "train.device=cpu"])
    report = diffprune.train_dit(config, small_run.latents, tmp_path / "run")
    rate = matmul_rate(torch.device("cpu"), torch.float32)  # measured once in a process
    used = report["images_per_second"] * report["operations_per_image"] / rate
    assert report["mfu"] == pytest.approx(used, abs=1e-4) and report["images_per_second"] > 0
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        used = numbers["images_per_second"] * report["operations_per_image"] / rate
        assert numbers["mfu"] == pytest.approx(used, abs=1e-4)
    assert [duration(s) for s in (0, 61.4, 3723, 90000)] == ["0:00", "1:01", "1:02:03", "25:00:00"]


def test_the_progress_line_says_how_it_goes(small_run, tmp_path, capsys):
    train(small_run, tmp_path / "run")
    assert "loss " in (line := capsys.readouterr().err) and "gradient " in line and "MFU " in line and " left" in line


@pytest.mark.parametrize(
    "kind, override, message",
    [
        ("dit", "train.accumulate=65", "accumulate: expected at most batch_size 64, got 65"),
        ("dit", "train.explosion_factor=0.5", "explosion_factor: expected 0, or a number above 1, got 0.5"),
        ("dit", "train.timesteps=cosine", "train.timesteps: expected 'uniform' or 'lognormal', found 'cosine'"),
        ("vqvae", "train.compile=true", "train.compile: expected false for a VQ-VAE"),
        ("vqvae", "train.timesteps=lognormal", "train.timesteps: a VQ-VAE draws no times"),
    ],
)
def test_options_that_do_not_fit_are_refused(kind, override, message):
    with pytest.raises(InputError, match=message):
        load_config(None, kind, [override])
    assert TrainConfig().accumulate == 1


# Unit codes


def test_unit_codes_are_looked_up_by_cosine_and_stay_units(small_run, tmp_path):
    config = load_config(None, "vqvae", [*VQVAE_RUN, "model.normalize_codes=true", "model.latent_channels=3"]).model
    model = VQVAE(config, seed=2)
    latents = 5 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    quantized, codes = model.quantize(latents)
    assert torch.equal(codes, torch.einsum("bdhw,kd->bkhw", latents, model.codebook).argmax(dim=1))
    torch.testing.assert_close(quantized.norm(dim=1), torch.ones(2, 4, 4))
    run = ["model.normalize_codes=true", "train.steps=30", "train.lr=0.003"]
    config = load_config(None, "vqvae", [*VQVAE_RUN, *run, "train.log_every=1"])
    report = diffprune.train_vqvae(config, small_run.shards, tmp_path / "run")
    found, _ = load_vqvae(tmp_path / "run")
    torch.testing.assert_close(found.codebook.norm(dim=1), torch.ones(16))
    _, images = load_images(small_run.shards, size=16, channels=1)
    with torch.inference_mode():
        latents = found.latents(torch.from_numpy(images).float() / 127.5 - 1)
    torch.testing.assert_close(latents.norm(dim=1), torch.ones(latents[:, 0].shape))
    assert report["codebook_use"] == len(found.quantize(latents)[1].unique()) / 16 > 0.2
    assert report["latent_scale"] == pytest.approx(1 / latents.double().std(correction=0).item(), rel=1e-4)
    log = [
        json.loads(line)["reconstruction_error"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert np.mean(log[-5:]) < 0.8 * np.mean(log[:5])
    with pytest.raises(InputError, match="latent_channels: expected at least 2 with normalize_codes, got 1"):
        load_config(None, "vqvae", ["model.normalize_codes=true", "model.latent_channels=1"])
