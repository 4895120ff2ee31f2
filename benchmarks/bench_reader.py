"""Images and raw samples per second out of shards, against webdataset on the same shards and cores.

    python -m pytest benchmarks/bench_reader.py --benchmark-enable

Photos (scikit-learn's china.jpg and flower.jpg in many cuts, 500×375, JPEG quality 75 to 95, with cls and json), and
samples as small as digits for the raw rate, where headers are all that counts. webdataset runs as its users run it: in
one process, with two DataLoader workers that send Pillow images, and with two that send batches of tensors through
shared memory. Without --benchmark-enable only the check runs: pixels and samples must be equal, or there is no speed.
"""

from __future__ import annotations

import io
import os
import platform
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffprune.decode import center_crop, read_batches
from diffprune.shards import ShardReader, index_shards

webdataset = pytest.importorskip("webdataset")
PHOTOS, DIGITS, SHARDS, SIZE, WORKERS = 200, 4000, 2, 256, 2
rates: dict[str, float] = {}  # median, per second


def write_shards(folder: Path, images: list[bytes], extension: str) -> str:
    """Two shards of samples with image, cls and json; returns their brace pattern."""
    for shard in range(SHARDS):
        with tarfile.open(folder / f"a-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(shard, len(images), SHARDS):
                json = b'{"uid": "%032x"}' % row
                for name, data in ((extension, images[row]), ("cls", b"%d" % (row % 1000)), ("json", json)):
                    info = tarfile.TarInfo(f"{row:09d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{folder}/a-{{000000..{SHARDS - 1:06d}}}.tar"


def photos() -> list[bytes]:
    """JPEGs of 500×375 pixels and about 48 kB: cuts, flips and scales of two real photos."""
    from PIL import Image

    originals = pytest.importorskip("sklearn.datasets").load_sample_images().images
    rng = np.random.default_rng(0)
    jpegs = []
    for row in range(PHOTOS):
        image = Image.fromarray(originals[row % 2])
        height = int(427 * rng.uniform(0.6, 1))
        width = height * 4 // 3
        left, top = rng.integers(0, 641 - width), rng.integers(0, 428 - height)
        image = image.resize((500, 375), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(75, 96)))
        jpegs.append(buffer.getvalue())
    return jpegs


def webdataset_loader(shards: str, *, decode: bool, transform: Callable | None = None, workers: int = 0):
    dataset = webdataset.WebDataset(shards, shardshuffle=False)
    if decode:
        dataset = dataset.decode("pil")
    if transform is not None:
        dataset = dataset.map(transform).batched(32)
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset


def to_tensor(sample: dict) -> tuple[torch.Tensor]:
    return (torch.from_numpy(np.array(sample["jpg"])),)


def cropped(sample: dict) -> tuple[torch.Tensor]:
    return (torch.from_numpy(np.array(center_crop(sample["jpg"], SIZE))),)


def count(loader) -> int:
    """Walk over a loader of samples or of batches."""
    return sum(1 if isinstance(item, dict) else len(item[0]) for item in loader)


def ours(shards: str, size: int | None, threads: int) -> int:
    total = 0
    for index in index_shards(shards):
        for batch in read_batches(index, size=size, channels=3, batch_size=32, threads=threads):
            total += len(batch.samples)
    return total


def ours_raw(shards: str) -> int:
    total = 0
    for index in index_shards(shards):
        with ShardReader(index.path, index.size) as reader:
            for _, members in reader.samples(index.samples):
                total += len(members) > 0
    return total


def ways(shards: dict[str, str]) -> dict[str, tuple[str, int, Callable[[], int]]]:
    """Name -> (what is compared, how many it is, the walk)."""
    photo, digit = shards["photos"], shards["digits"]
    found: dict[str, tuple[str, int, Callable[[], int]]] = {}
    for size, what, transform in ((None, "decode", to_tensor), (SIZE, f"decode, {SIZE}×{SIZE}", cropped)):
        found[f"{what}: webdataset, 1 process"] = (
            what,
            PHOTOS,
            lambda transform=transform, size=size: count(
                webdataset_loader(photo, decode=True, transform=transform if size else None)
            ),
        )
        if size is None:
            found[f"{what}: webdataset, {WORKERS} workers, Pillow images"] = (
                what,
                PHOTOS,
                lambda: count(webdataset_loader(photo, decode=True, workers=WORKERS)),
            )
        found[f"{what}: webdataset, {WORKERS} workers, tensors"] = (
            what,
            PHOTOS,
            lambda transform=transform: count(
                webdataset_loader(photo, decode=True, transform=transform, workers=WORKERS)
            ),
        )
        for threads in (1, WORKERS):
            found[f"{what}: diffprune, {threads} thread(s)"] = (
                what,
                PHOTOS,
                lambda size=size, threads=threads: ours(photo, size, threads),
            )
    for what, where, number in (("raw photos", photo, PHOTOS), ("raw digits", digit, DIGITS)):
        for workers in (0, WORKERS):
            found[f"{what}: webdataset, {f'{workers} workers' if workers else '1 process'}"] = (
                what,
                number,
                lambda where=where, workers=workers: count(webdataset_loader(where, decode=False, workers=workers)),
            )
        found[f"{what}: diffprune, 1 thread"] = (what, number, lambda where=where: ours_raw(where))
    return found


NAMES = list(ways({"photos": "", "digits": ""}))


@pytest.fixture(scope="module")
def walks(tmp_path_factory) -> dict[str, tuple[str, int, Callable[[], int]]]:
    """Fails where pixels, labels or bytes differ: a wrong result has no speed."""
    shards = {}
    images = {"photos": photos(), "digits": [bytes([row % 251]) * (300 + row % 500) for row in range(DIGITS)]}
    for name, data in images.items():
        shards[name] = write_shards(tmp_path_factory.mktemp(name), data, "jpg" if name == "photos" else "png")
    check_raw(shards["photos"])
    check_raw(shards["digits"])
    check_pixels(shards["photos"], None)
    check_pixels(shards["photos"], SIZE)
    return ways(shards)


def check_raw(shards: str) -> None:
    theirs = [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in webdataset_loader(shards, decode=False)
    ]
    found = []
    for index in index_shards(shards):
        with ShardReader(index.path) as reader:
            found += [(sample.key, members) for sample, members in reader.samples(index.samples)]
    if found != theirs:
        pytest.fail("samples differ from webdataset's; no speed is reported")


def check_pixels(shards: str, size: int | None) -> None:
    batches = (
        batch
        for index in index_shards(shards)
        for batch in read_batches(index, size=size, channels=3, batch_size=32, threads=WORKERS)
    )
    found = {
        key: (image, label)
        for batch in batches
        for key, image, label in zip(batch.keys, batch.images, batch.labels, strict=True)
    }
    seen = 0
    for sample in webdataset_loader(shards, decode=True):
        expected = center_crop(sample["jpg"], size) if size else sample["jpg"]
        image, label = found[sample["__key__"]]
        if not np.array_equal(image.transpose(1, 2, 0), np.asarray(expected)) or label != sample["cls"]:
            pytest.fail(f"pixels or label of {sample['__key__']} differ from webdataset's; no speed is reported")
        seen += 1
    if seen != len(found) or seen != PHOTOS:
        pytest.fail(f"expected {PHOTOS} images, found {len(found)} and webdataset {seen}; no speed is reported")


@pytest.mark.parametrize("name", NAMES)
def test_per_second(benchmark, walks, name):
    _, number, walk = walks[name]
    if not benchmark.enabled:
        pytest.skip("timed with --benchmark-enable only")
    assert benchmark.pedantic(walk, rounds=5, warmup_rounds=1) == number
    rates[name] = number / benchmark.stats.stats.median
    benchmark.extra_info.update(per_second=rates[name])


def test_report(walks, capsys):
    if len(rates) < len(NAMES):
        pytest.skip("timed with --benchmark-enable only")
    from PIL import __version__ as pillow

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"{platform.processor() or platform.machine()}, {cores} cores, Python {platform.python_version()}, "
        f"webdataset {webdataset.__version__}, Pillow {pillow}, torch {torch.__version__}",
    ]
    for what in dict.fromkeys(what for what, _, _ in walks.values()):
        names = [name for name in NAMES if walks[name][0] == what]
        lines += [f"{name:>52}: {rates[name]:10,.0f} /s" for name in names]
        best = max(rates[name] for name in names if "diffprune" in name)
        for name in names:
            if "webdataset" in name:
                lines.append(f"{best / rates[name]:>46.2f} times {name.partition(': ')[2]}")
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))
