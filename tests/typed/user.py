"""A user's program, for mypy: ``test_typing`` checks it, nothing runs it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import assert_type

import diffprune
from diffprune.config import DitRun, VqvaeRun, load_config
from diffprune.kernels import kmeans_assign, linear_grad_sqnorm, pairwise_topk
from diffprune.models.vqvae import VQVAE
from diffprune.per_sample import PerSampleGradients
from diffprune.storage import as_path

tensor = torch.zeros(4, 3)
array: NDArray[Any] = np.zeros((4, 3), np.float32)
print(tensor.nothing)  # type: ignore[attr-defined]  # else a tensor would be Any, and all that follows true
print(array.nothing)  # type: ignore[attr-defined]

# Ops answer in kind.
assert_type(kmeans_assign(tensor, tensor), tuple[Tensor, Tensor])
assert_type(kmeans_assign(array, array), tuple[NDArray[Any], NDArray[Any]])
assert_type(pairwise_topk(tensor, tensor, 2), tuple[Tensor, Tensor])
assert_type(linear_grad_sqnorm(tensor, tensor, bias=True), Tensor)

# What `import diffprune` gives is known to checkers and editors, though it is imported on first use.
assert_type(diffprune.select("clusters/", Path("kept.parquet"), order="balanced", prune=0.9), dict[str, Any])
assert_type(diffprune.KMeans(2, metric="cosine").fit(array), diffprune.KMeans)
assert_type(diffprune.KMeans(2).fit(tensor).inertia_, float)
assert_type(diffprune.select_rows({"grand": tensor, "label": [1, 2]}, by="grand", prune=0.5), NDArray[Any])
run = load_config(None, "dit", ["train.steps=100"])
assert_type(run, DitRun)
assert_type(load_config(Path("vqvae.toml"), "vqvae"), VqvaeRun)
live = diffprune.LiveLatents(["s3://bucket/a.tar", Path("b.tar")], "vqvae/")
assert_type(diffprune.train_dit(run, live, "dit/"), dict[str, Any])
assert_type(diffprune.score(live, ["dit/"], as_path("s3://bucket/scores")), dict[str, Any])
diffprune.train_vqvae(run, "shards/", "vqvae/")  # type: ignore[arg-type]
assert_type(VQVAE().codebook, Tensor)
diffprune.select("clusters/", "kept.parquet", prunes=0.9)  # type: ignore[call-arg]
diffprune.selects("clusters/")  # type: ignore[attr-defined]

with diffprune.per_sample_gradients(torch.nn.Linear(3, 1), direction={"weight": tensor}) as grads:
    assert_type(grads, PerSampleGradients)
assert_type(grads.sqnorm, Tensor)

try:
    diffprune.pack("photos/", "shards/")
except diffprune.InputError as error:
    assert_type(error, diffprune.InputError)
