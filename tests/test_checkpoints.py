"""Checkpoints come back as they were saved, and damaged, foreign or hostile ones are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffprune.checkpoints import list_checkpoints, load_dit, load_foreign_dit, load_vqvae, save_checkpoint
from diffprune.config import DitConfig, DitRun, VqvaeConfig, VqvaeRun, to_dict
from diffprune.errors import InputError
from diffprune.files import sha256_file
from diffprune.models.dit import DiT
from diffprune.models.vqvae import VQVAE

DIT = DitConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=8, depth=1, num_heads=2, num_classes=3)


def save_dit(run: Path, step: int, seed: int = 0) -> Path:
    model, ema = DiT(**asdict(DIT), seed=seed), DiT(**asdict(DIT), seed=seed + 100)
    tensors = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": {"step.x": torch.ones(())}}
    return save_checkpoint(run, state("dit", step, DitRun(model=DIT)), tensors)


def save_vqvae(run: Path, step: int = 1) -> Path:
    config = VqvaeRun(model=VqvaeConfig(image_size=8, base_channels=4, channel_multipliers=(1,), codebook_size=5))
    model = VQVAE(config.model)
    model.latent_scale.fill_(2.5)
    return save_checkpoint(run, state("vqvae", step, config), {"model": model.state_dict()})


def state(kind: str, step: int, run: DitRun | VqvaeRun) -> dict:
    return {
        "kind": kind,
        "step": step,
        "total_steps": 400,
        "lr": 0.001,
        "images_seen": step * 64,
        "seed": 0,
        "config": to_dict(run),
        "data": {"samples": 5, "sha256": "0"},
        "latents": None,
    }


def edit_state(checkpoint: Path, **changes) -> None:
    path = checkpoint / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_tensors(checkpoint: Path, name: str, tensors: dict) -> None:
    """Tensors of another run, with the hash that belongs to them."""
    save_file(tensors, checkpoint / name)
    files = json.loads((checkpoint / "state.json").read_text())["files"]
    edit_state(checkpoint, files={**files, name: sha256_file(checkpoint / name)})


def test_what_is_saved_comes_back(tmp_path):
    checkpoint = save_dit(tmp_path, 400)
    assert checkpoint == tmp_path / "step_00000400"
    assert sorted(os.listdir(checkpoint)) == sorted(
        ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]
    )
    for weights, seed in (("model", 0), ("ema", 100)):
        model, found = load_dit(checkpoint, weights)
        expected = DiT(**asdict(DIT), seed=seed).state_dict()
        assert list(model.state_dict()) == list(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        assert found["sha256"] == sha256_file(checkpoint / f"{weights}.safetensors")
        assert (found["step"], found["total_steps"], found["lr"]) == (400, 400, 0.001)
        assert not model.pos_embed.requires_grad and model.blocks[0].mlp.fc1.weight.requires_grad
        assert not model.training and model.config == DIT
    assert load_dit(checkpoint)[1]["sha256"] == sha256_file(checkpoint / "ema.safetensors")
    vqvae, _ = load_vqvae(save_vqvae(tmp_path / "vqvae"))
    assert vqvae.latent_scale == 2.5 and vqvae.config.channel_multipliers == (1,)


def test_a_latent_scale_that_diverged_is_told(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run.vqvae, folder)
    checkpoint = list_checkpoints(folder)[-1]
    path = checkpoint / "model.safetensors"
    save_file({**load_file(path), "latent_scale": torch.tensor(torch.nan)}, path)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"]["model.safetensors"] = sha256_file(path)
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"step_00000006: latent_scale is nan, expected a finite number"):
        load_vqvae(folder)


def test_a_run_folder_is_its_checkpoints_by_step(tmp_path):
    for step in (20_000_000, 20, 123_456_789):
        save_dit(tmp_path, step, seed=step % 7)
    (tmp_path / ".tmp-step_00000021").mkdir()
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "log.jsonl").write_text("")
    names = ["step_00000020", "step_20000000", "step_123456789"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert list_checkpoints(tmp_path / names[0]) == [tmp_path / names[0]]
    assert load_dit(tmp_path)[1]["step"] == 123_456_789
    for empty in (tmp_path / "step_notes", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"{empty}: no (checkpoint in this|such) folder"):
            list_checkpoints(empty)


def test_saving_the_same_gives_the_same_bytes(tmp_path):
    one, two = save_dit(tmp_path / "a", 3), save_dit(tmp_path / "b", 3)
    for name in os.listdir(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_damage_is_told(tmp_path):
    good = save_dit(tmp_path / "good", 1)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name / "step_00000001"))

    flipped = copy("flipped")
    data = bytearray((flipped / "ema.safetensors").read_bytes())
    data[-3] ^= 1
    (flipped / "ema.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"ema.safetensors: damaged: expected sha256 [0-9a-f]{64}, found"):
        load_dit(flipped)
    load_dit(flipped, "model")  # the other file is good

    missing = copy("missing")
    (missing / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=r"ema.safetensors: no such file, although state.json lists it"):
        load_dit(missing)

    for name, content in [("short", b"\x10"), ("long", b"\xff" * 64), ("header", b"\x04" + bytes(7) + b"{[}]")]:
        malformed = copy(name)
        (malformed / "ema.safetensors").write_bytes(content)
        files = json.loads((malformed / "state.json").read_text())["files"]
        edit_state(malformed, files={**files, "ema.safetensors": sha256_file(malformed / "ema.safetensors")})
        with pytest.raises(InputError, match=r"ema.safetensors: not a readable safetensors file"):
            load_dit(malformed)

    cut = copy("cut")
    (cut / "state.json").write_text((cut / "state.json").read_text()[:200])
    with pytest.raises(InputError, match=r"state.json: not valid JSON"):
        load_dit(cut)
    for changes, message in [
        ({"format_version": 9}, r"state.json: expected a checkpoint of format_version 1, found 9"),
        ({"step": "many"}, r"state.json: step: expected int, found 'many'"),
        ({"files": None}, r"state.json: files: expected dict, found None"),
        ({"config": {"model": {"depth": "x"}}}, r"state.json: model.depth: expected an int, found 'x'"),
        ({"config": {"model": {"widht": 3}}}, r"state.json: \[model\]: unknown key 'widht'"),
    ]:
        broken = copy(f"broken-{next(iter(changes))}-{len(message)}")
        edit_state(broken, **changes)
        with pytest.raises(InputError, match=message):
            load_dit(broken)


def test_tensors_that_do_not_fit_the_config_are_told(tmp_path):
    checkpoint = save_dit(tmp_path, 1)
    good = load_file(checkpoint / "ema.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    for tensors, message in [
        ({**good, name: torch.zeros(5, 8)}, rf"tensor '{name}': expected \[32, 8\] float32, found \[5, 8\] float32"),
        ({**good, name: good[name].half()}, rf"tensor '{name}': expected \[32, 8\] float32, found \[32, 8\] float16"),
        ({k: v for k, v in good.items() if k != name}, rf"tensor '{name}' is missing: expected \[32, 8\] float32"),
        ({**good, "extra": torch.zeros(2)}, r"tensor 'extra' \[2\] float32 is not part of this model's config"),
    ]:
        replace_tensors(checkpoint, "ema.safetensors", tensors)
        with pytest.raises(InputError, match=rf"ema.safetensors: {message}"):
            load_dit(checkpoint)


def test_the_wrong_kind_and_missing_weights_are_told(tmp_path):
    dit, vqvae = save_dit(tmp_path / "dit", 1), save_vqvae(tmp_path / "vqvae")
    with pytest.raises(InputError, match="expected a checkpoint of a vqvae, found one of a dit"):
        load_vqvae(dit)
    with pytest.raises(InputError, match="expected a checkpoint of a dit, found one of a vqvae"):
        load_dit(vqvae)
    with pytest.raises(InputError, match="weights: expected ema or model, got 'best'"):
        load_dit(dit, "best")
    run = DitRun(model=DIT)
    only = save_checkpoint(tmp_path / "only", state("dit", 1, run), {"model": DiT(**asdict(DIT)).state_dict()})
    with pytest.raises(InputError, match=r"no ema.safetensors; it has model.safetensors; .* take weights \"model\""):
        load_dit(only)


def test_a_checkpoint_that_fails_on_the_way_leaves_nothing(tmp_path):
    save_dit(tmp_path, 1)
    with pytest.raises(ValueError):  # JSON has no NaN
        save_checkpoint(tmp_path, {"step": 2, "lr": float("nan")}, {"model": {"a": torch.zeros(1)}})
    assert os.listdir(tmp_path) == ["step_00000001"]


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["DIFFPRUNE_TEST_PAYLOAD"],))


def test_a_foreign_state_dict_loads_and_nothing_else_does(tmp_path, monkeypatch):
    """The published files are plain state dicts; training checkpoints of that code hold one under "ema"."""
    expected = DiT(**asdict(DIT), seed=4)
    for name, content in [
        ("plain.pt", expected.state_dict()),
        ("training.pt", {"ema": expected.state_dict(), "model": {}, "opt": {"lr": 1.0}}),
    ]:
        torch.save(content, tmp_path / name)
        model = load_foreign_dit(tmp_path / name, DIT)
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())

    monkeypatch.setenv("DIFFPRUNE_TEST_PAYLOAD", str(tmp_path / "owned"))
    torch.save({"ema": Payload()}, tmp_path / "hostile.pt")
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:900])
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("hostile.pt", "noise.pt", "empty.pt", "junk.pt", "cut.pt", "list.pt"):
        with pytest.raises(InputError, match=f"{name}: expected a state dict of tensors"):
            load_foreign_dit(tmp_path / name, DIT)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(InputError, match=r"plain.pt: tensor 'blocks.1.attn.qkv.weight' is missing: expected \[24, 8\]"):
        load_foreign_dit(tmp_path / "plain.pt", DitConfig(**{**asdict(DIT), "depth": 2}))
    with pytest.raises(InputError, match="no such file"):
        load_foreign_dit(tmp_path / "nowhere.pt", DIT)
