"""FID's Inception: the published names and shapes, values of another implementation, and what it refuses to load."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffprune
from diffprune.arrays import ArrayFolder
from diffprune.decode import load_images
from diffprune.errors import InputError
from diffprune.models import inception
from diffprune.models.inception import FidInception, load_inception, resize_bilinear_tf1

# SHA-256 of the sorted lines "name shape" of the published state dict, without the counters num_batches_tracked.
PUBLISHED = "bd04e829988dd22dd0bbf9e499a87af311ed57c1b4309a9d20a907d8ed4123d4"


def made_up_weights() -> dict[str, torch.Tensor]:
    """Tensors in closed form, in the order of the published file, that keep activations near 1."""
    with torch.device("meta"):
        published = FidInception().state_dict()
    tensors = {}
    for layer, (name, like) in enumerate(published.items()):
        if name.endswith("num_batches_tracked"):
            continue
        wave = torch.sin(torch.arange(like.numel(), dtype=torch.float64) * 12.9898 + layer) * 43758.5453
        wave = (wave.frac().view(like.shape).abs() - 0.5) * math.sqrt(12)  # as good as random, variance 1
        if like.dim() > 1:
            tensors[name] = wave * math.sqrt(2 / like[0].numel())
        else:
            tensors[name] = 1 + 0.2 * wave if name.endswith(("bn.weight", "var")) else 0.1 * wave
    return {name: tensor.float() for name, tensor in tensors.items()}


def two_images() -> torch.Tensor:
    grid = torch.arange(2 * 3 * 40 * 52, dtype=torch.float64).view(2, 3, 40, 52)
    return ((torch.sin(grid * 0.37) * torch.cos(grid * 0.011) + 1) * 127.5).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(made_up_weights(), path)
    return path


def test_names_shapes_and_size_are_those_of_the_published_file():
    with torch.device("meta"):
        model = FidInception()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    lines = sorted(f"{name} {shape}" for name, shape in shapes.items() if not name.endswith("num_batches_tracked"))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED
    assert sum(parameter.numel() for parameter in model.parameters()) == 23_850_960
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == [128, 128, 1, 7] and shapes["fc.weight"] == [1008, 2048]


def test_features_are_those_of_torch_fidelity(weights):
    """The numbers below are torch-fidelity 0.4.0's for these weights and images, in float64."""
    model, info = load_inception(weights)
    assert info["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    features = model(two_images())
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    exact = model.double()(two_images())
    assert (features - exact).abs().max() < 1e-3 * exact.std()
    assert exact[0, ::400].tolist() == pytest.approx(
        [3.07746661, 0.281443787, 0.0061068064, 0.452200179, 0, 0.155751327], abs=1e-7
    )
    assert exact[1, ::400].tolist() == pytest.approx(
        [3.15408289, 0.266835327, 0.000515085461, 0.534430797, 0, 0.192219319], abs=1e-7
    )
    assert exact.square().sum().item() == pytest.approx(13632.77014, rel=1e-6)
    assert model.logits(exact)[:, 7].tolist() == pytest.approx([-0.503022938, -0.505191463], rel=1e-6)


def test_torch_fidelity_agrees(weights):
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    other = extractor.FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=str(weights))
    assert torch.allclose(load_inception(weights)[0](two_images()), other(two_images())[0], rtol=1e-5, atol=1e-5)


def test_resizing_is_tensorflow_1s():
    """Pixel i of the output is read at i·length/size: no half-pixel shift, no filter, the edge held."""
    ramp = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    row = resize_bilinear_tf1(ramp, 6)[0, 0, 0]
    assert row.tolist() == pytest.approx([0, 20 / 3, 40 / 3, 20, 80 / 3, 30], rel=1e-6)
    assert torch.equal(resize_bilinear_tf1(ramp, 2)[0, 0], torch.tensor([[0.0, 20.0], [0.0, 20.0]]))
    column = resize_bilinear_tf1(ramp.transpose(2, 3), 6)[0, 0, :, 3]
    assert column.tolist() == pytest.approx(row.tolist())
    image = torch.randn(2, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_bilinear_tf1(image, 299), image)
    wide = torch.randn(1, 2, 5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = resize_bilinear_tf1(wide, 7)
    for y in range(7):
        for x in range(7):
            v, u = y * 5 / 7, x * 9 / 7
            top, left = int(v), int(u)
            down, right = min(top + 1, 4), min(left + 1, 8)
            fv, fu = v - top, u - left
            corners = (1 - fv) * ((1 - fu) * wide[..., top, left] + fu * wide[..., top, right])
            corners = corners + fv * ((1 - fu) * wide[..., down, left] + fu * wide[..., down, right])
            assert torch.allclose(found[..., y, x], corners, atol=1e-6)


def test_safetensors_with_counters_load_too(weights, tmp_path):
    save_file(made_up_weights() | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}, tmp_path / "x.safetensors")
    first, other = (load_inception(path)[0].state_dict() for path in (weights.parent, tmp_path / "x.safetensors"))
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_missing_or_other_weights_are_told(weights, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"here: no such file; download pt_inception-2015-12-05-6726825d.pth from"):
        load_inception(tmp_path / "here")
    with pytest.raises(InputError, match=r"6726825d.pth: no such file"):
        load_inception(tmp_path)
    tensors = made_up_weights()
    for change, message in [
        ({"fc.weight": torch.ones(1000, 2048)}, r"'fc.weight': expected \[1008, 2048\], found \[1000, 2048\] float32"),
        ({"AuxLogits.fc.bias": torch.ones(1000)}, "'AuxLogits.fc.bias' is not part of FID's Inception"),
        ({"fc.bias": torch.full((1008,), torch.nan)}, "'fc.bias' has values that are not finite"),
        ({"fc.bias": torch.ones(1008, dtype=torch.int64)}, "found .1008. int64"),
    ]:
        monkeypatch.setattr(inception, "read_weights", lambda path, change=change: tensors | change)
        with pytest.raises(InputError, match=message):
            load_inception(weights)
    del tensors["Mixed_7c.branch_pool.bn.bias"]
    monkeypatch.setattr(inception, "read_weights", lambda path: dict(tensors))
    with pytest.raises(InputError, match=r"'Mixed_7c.branch_pool.bn.bias': expected \[192\], found none"):
        load_inception(weights)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_no_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"fc.bias": Hostile()}, protocol=2))
    torch.save({"fc.bias": Hostile()}, tmp_path / "evil2.pth")
    (tmp_path / "text.safetensors").write_text("no")
    (tmp_path / "list.pth").write_bytes(b"")
    for name in ("evil.pth", "evil2.pth", "text.safetensors", "list.pth"):
        with pytest.raises(InputError, match=name):
            load_inception(tmp_path / name)
    assert not (tmp_path / "hacked").exists()


def test_images_must_be_bytes_of_three_channels(weights):
    model, _ = load_inception(weights)
    for images in (two_images().float(), two_images()[:, :1], two_images()[0]):
        with pytest.raises(InputError, match=r"expected images uint8 \[B, 3, H, W\]"):
            model(images)


def test_embed_writes_features_that_are_not_normalised(weights, tmp_path):
    for i, image in enumerate(torch.cat([two_images(), two_images().flip(3)])[:3, :, :40, :40].permute(0, 2, 3, 1)):
        (tmp_path / "images" / str(i)).mkdir(parents=True)
        Image.fromarray(image.numpy()).save(tmp_path / "images" / str(i) / "x.png")
    diffprune.pack(tmp_path / "images", tmp_path / "shards", shard_size=2)
    result = diffprune.embed(tmp_path / "shards", tmp_path / "out", model=f"inception@40:{weights}", batch_size=2)
    assert (result["samples"], result["failed"]) == (3, 0)
    folder = ArrayFolder(tmp_path / "out", "embeddings")
    assert folder.metadata["image_size"] == 40 and folder.metadata["shape"] == [2048]
    assert folder.metadata["unit_length"] is False and "tensorflow" in folder.metadata["resize"]
    table, images = load_images(tmp_path / "shards", size=40, channels=3)
    rows, values = folder.load()
    assert rows["key"].to_pylist() == table["key"].to_pylist()
    expected = load_inception(weights)[0](torch.from_numpy(images)).numpy()
    assert np.allclose(values, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["inception:", "inception@0:x", "inception@big:x", "inception"])
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(InputError, match="inception:PATH"):
        inception.inception_features(name)
