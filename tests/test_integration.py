"""docs/integration.md, line by line: its code runs in other people's libraries, and its results are right."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import diffprune
from diffprune.shards import index_shards

PAGE = Path(__file__).parents[1] / "docs" / "integration.md"
FEATURES = "def features(images):\n    return images.float().flatten(1)[:, :16]\n"


@pytest.fixture
def page(tmp_path, monkeypatch) -> dict[str, object]:
    """What the page's lines leave behind; the files that they speak of are there before."""
    for library in ("datasets", "diffusers", "webdataset", "wids"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "wids-cache"))
    (tmp_path / "page_features.py").write_text(FEATURES)
    pixels = np.random.default_rng(0)
    for folder in ("cats", "dogs.v1", "dogs.v1/more of them"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for number in range(20):
            picture = Image.fromarray(pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            picture.save(tmp_path / "photos" / folder / f"picture {number}.png")
    diffprune.pack("photos/", "shards/", shard_size=16)
    diffprune.embed("shards/", "embeddings/", model="page_features:features")
    diffprune.select("embeddings/", "kept.parquet", order="random", prune=0.5)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_pages_lines_run_and_are_right(page):
    count = len(page["embeddings"])
    assert len(page["nearest"]) == count // 10 and len(page["balanced"]) == 200 and len(page["covering"]) == 50
    assert np.bincount(page["fitted"].assignment_[page["balanced"]]).tolist() == [10] * 20

    model, images, labels = page["classifier"], page["images"], page["labels"]
    for row in range(len(labels)):
        logits = model(images[row : row + 1])
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels[row : row + 1]), list(model.parameters()))
        norm = sum(gradient.double().square().sum() for gradient in gradients).sqrt()
        torch.testing.assert_close(page["scores"]["grand"][row], norm, rtol=1e-5, atol=0)
        error = logits[0].softmax(dim=0) - torch.eye(10)[labels[row]]
        torch.testing.assert_close(page["scores"]["el2n"][row], error.norm(), rtol=1e-4, atol=0)
    assert len(page["hard"]) == 32 and len(set(labels[page["hard"]].tolist())) == 10

    norms, kept = torch.cat(page["norms"]), page["pruned"]["number"]
    assert norms.isfinite().all() and torch.cat(page["dots"]).shape == (24,)
    assert sorted(norms.argsort(descending=True)[:12].tolist()) == [int(number) for number in kept]

    keys = set(pq.read_table("kept.parquet")["key"].to_pylist())
    assert len(keys) == 30 and page["keys"] == keys
    assert sorted(page["seen"]) == sorted(keys)  # each once, of two workers
    assert sorted(sample["__key__"] for sample in page["streamed"]) == sorted(keys)
    indexed = page["indexed"]
    assert sorted(indexed[row]["__key__"] for row in range(len(indexed))) == sorted(keys)

    assert len(page["kept_paths"]) == 30 and all(path.is_file() for path in page["kept_paths"])
    by_key = {sample.key: index.path for index in index_shards("shards/") for sample in index.samples}
    assert set(by_key) == set(page["paths"])
    assert page["packed"]["count"] == 60 and len(page["chosen_paths"]) == 15
    table = page["table"]["path"]
    for index in index_shards("table-shards/"):  # the rows' numbers are in the keys, with the files' own bytes
        for sample in index.samples:
            row = int(re.search(r"(\d+)$", sample.key)[1])
            data = index.path.read_bytes()[sample.offset : sample.offset + sample.size]
            assert Path(table[row]).read_bytes() in data, sample.key
