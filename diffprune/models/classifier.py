"""A small convolutional classifier of labelled images: features for data sets that no published encoder was made for.

Digits, for one: an encoder of photographs sees little in them. Its features are those before the last layer, as FID
takes them from Inception.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffprune._version import __version__
from diffprune.checkpoints import check_tensors
from diffprune.decode import load_images
from diffprune.device import full_float32, pick_device
from diffprune.errors import InputError
from diffprune.files import atomic_dir, read_json, sha256_file, write_json
from diffprune.progress import progress
from diffprune.shards import ShardSpec, index_shards, show_spec
from diffprune.tensor_files import write_tensors
from diffprune.training_order import batch_rows, step_generator

WEIGHTS_FILE, ABOUT_FILE = "classifier.safetensors", "classifier.json"
FEATURES, EPOCHS, BATCH, RATE, SHIFT = 64, 12, 100, 2e-3, 2
MAX_IMAGE_SIZE = 64


class Classifier(nn.Module):
    """[B, channels, S, S] images in [-1, 1] -> logits [B, classes]; S a multiple of 8.

    Three 3×3 convolutions of 16, 32 and 64 channels, each followed by ReLU and 2×2 max-pooling, a linear layer to
    ``features`` [B, 64], and, after ReLU and dropout of a half, one to the logits.
    """

    def __init__(self, image_size: int, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64)
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths))
        self.embedding = nn.Linear(widths[-1] * (image_size // 8) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """What ``embed`` takes: [B, 64], before the last ReLU."""
        for convolution in self.convolutions:
            images = F.max_pool2d(F.relu(convolution(images)), 2)
        return self.embedding(images.flatten(1))

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        hidden = F.relu(self.features(images))
        if generator is not None:
            hidden = hidden * (torch.rand(hidden.shape, generator=generator) < 0.5).to(hidden) * 2
        return self.head(hidden)


def train_classifier(
    shards: ShardSpec,
    out: str | os.PathLike,
    *,
    image_size: int | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Train a ``Classifier`` on the labelled images of shards, all in memory, and write it to the folder ``out``.

    In batches of 100 by AdamW, the images moved by up to 2 pixels each way. ``image_size``: by default the
    height of the first image; images are cropped to squares of it. One that is there already is left as it is.
    Returns ``out``, images, classes and ``accuracy`` on the images it was trained on.

    Raises InputError for images without labels, a size that is no multiple of 8 or over 64, or fewer than two classes.
    """
    out = Path(out)
    if (out / ABOUT_FILE).is_file():
        return {**read_json(out / ABOUT_FILE), "out": str(out)}
    chosen = pick_device(device)
    size, channels = _shape(shards, image_size)
    table, images = load_images(shards, size=size, channels=channels)
    statuses, told = table["status"].to_pylist(), table["label"].to_pylist()
    ok = [status == "ok" and label is not None for status, label in zip(statuses, told, strict=True)]
    labels = [label for label, good in zip(told, ok, strict=True) if good]
    classes = max(labels, default=-1) + 1
    if (count := len(set(labels))) < 2:
        raise InputError(f"{show_spec(shards)}: a classifier needs images of two classes or more, found {count}")
    pixels, target = torch.from_numpy(images[np.array(ok)]), torch.tensor(labels)
    model = _initialised(size, channels, classes, seed).to(chosen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    steps = -(-epochs * len(labels) // BATCH)
    with full_float32(), progress("train classifier", total=steps * BATCH, unit="images") as bar:
        for step in range(steps):
            generator = step_generator(seed, "classifier", step)
            rows = batch_rows(len(labels), BATCH, seed, step, "classifier epoch")
            batch = _moved(pixels[rows], generator).to(chosen)
            loss = F.cross_entropy(model(batch, generator), target[rows].to(chosen))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.advance(BATCH, note=f"loss {loss.item():.3f}")
        with torch.inference_mode():
            found = torch.cat([model(_scaled(part).to(chosen)).argmax(dim=1).cpu() for part in pixels.split(500)])
    about = {"version": __version__, "image_size": size, "channels": channels, "classes": classes, "seed": seed}
    about |= {"images": len(labels), "accuracy": float((found == target).double().mean())}
    with atomic_dir(out) as temporary:
        write_tensors(temporary / WEIGHTS_FILE, {name: value.cpu() for name, value in model.state_dict().items()})
        write_json(temporary / ABOUT_FILE, about)
    return {**about, "out": str(out)}


def load_classifier(folder: str | os.PathLike, device: torch.device) -> tuple[Classifier, dict[str, Any], str]:
    """The classifier of a folder, what is written about it, and the sha256 of its weights; InputError otherwise."""
    folder = Path(folder)
    about = read_json(folder / ABOUT_FILE)
    numbers = [about.get(name) if isinstance(about, dict) else None for name in ("image_size", "channels", "classes")]
    if not all(type(number) is int and 0 < number <= 1_000_000 for number in numbers) or numbers[0] > MAX_IMAGE_SIZE:
        raise InputError(f"{folder / ABOUT_FILE}: expected image_size, channels and classes of a classifier")
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    with torch.device("meta"):
        model = Classifier(*numbers)
    check_tensors(tensors, model.state_dict(), path)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval(), about, sha256_file(path)


def _shape(shards: ShardSpec, image_size: int | None) -> tuple[int, int]:
    """(height = width, channels): of gray images one channel; by the first image."""
    first = next((index.samples[0].key for index in index_shards(shards) if len(index.samples)), None)
    if first is None:
        raise InputError(f"{shards}: expected images, found none")
    _, image = load_images(shards, size=image_size, channels=3, keys=[first])
    size, gray = image.shape[-1], bool((image == image[:, :1]).all())
    if image.shape[-2] != size or size % 8 or size > MAX_IMAGE_SIZE:
        raise InputError(
            f"{shards}: key {first!r} is {size}×{image.shape[-2]} pixels: a classifier takes squares of a multiple of "
            f"8, at most {MAX_IMAGE_SIZE}; pack with a resize, or use another model"
        )
    return size, 1 if gray else 3


def _initialised(size: int, channels: int, classes: int, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(size, channels, classes)


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by its own -2 ... 2 pixels in both directions, its border repeated; in [-1, 1]."""
    padded = F.pad(_scaled(pixels), [SHIFT] * 4, mode="replicate")
    size = pixels.shape[-1]
    rows, columns = torch.randint(0, 2 * SHIFT + 1, (2, len(pixels)), generator=generator)
    across = torch.arange(size)
    image = torch.arange(len(pixels))[:, None, None]
    row, column = (rows[:, None] + across)[:, :, None], (columns[:, None] + across)[:, None]
    return padded.permute(0, 2, 3, 1)[image, row, column].permute(0, 3, 1, 2)
