"""What test_training_ranks.py starts with torchrun: trains, and leaves what each process reports.

python -m torch.distributed.run --nproc-per-node N tests/ranks_worker.py REQUEST.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial, partialmethod
from pathlib import Path

import torch

import diffprune
import diffprune.live_latents
import diffprune.training_images
import diffprune.training_latents
from diffprune import dit_objective, training_loop
from diffprune.config import load_config
from diffprune.errors import DiffpruneError, InputError
from diffprune.image_maps import ImageMap
from diffprune.models.dit import DiT


def save_slowly(seconds, *arguments):
    time.sleep(seconds)
    return save_checkpoint(*arguments)


def count_images(self, stem, *arguments):
    encoded.append(len(self.indexes[stem].samples))
    return run_images(self, stem, *arguments)


def gone(*_):
    raise InputError("the last process's images are gone")


torch.set_num_threads(1)
# All but the compiler's last stage, which takes half a minute. TEST_COMPILER=inductor, by hand, for all of it.
DiT.compile_blocks = partialmethod(DiT.compile_blocks, os.environ.get("TEST_COMPILER", "aot_eager"))
save_checkpoint = training_loop.save_checkpoint
free_bytes = diffprune.training_images.free_bytes
run_images, ImageMap.run = ImageMap.run, count_images
is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
for request in json.loads(Path(sys.argv[1]).read_text()):
    config = load_config(None, request["kind"], request["overrides"])
    for module in (diffprune.training_images, diffprune.training_latents, diffprune.live_latents):
        module.free_bytes = (lambda: 0) if "streamed" in request else free_bytes
    if "poisoned_step" in request:  # a NaN that only the last process sees
        real, calls = dit_objective.velocity_loss, []

        def poisoned(*arguments, real=real, calls=calls, step=request["poisoned_step"]):
            calls.append(1)
            return real(*arguments) * (float("nan") if is_last and len(calls) == step else 1)

        dit_objective.velocity_loss = poisoned
    if "slow_disk" in request:  # seconds
        training_loop.save_checkpoint = partial(save_slowly, request["slow_disk"])
    train = diffprune.train_dit if request["kind"] == "dit" else diffprune.train_vqvae
    encoded: list[int] = []
    if "gone" in request and is_last:
        ImageMap.batches = gone
    try:
        options = {name: request[name] for name in ("decode_with", "kept") if name in request}
        data = request.get("data_of_last", request["data"]) if is_last else request["data"]
        if "vqvae" in request:
            data = diffprune.LiveLatents(data, request["vqvae"], batch_size=8, device="cpu")
        answer = train(config, data, request["out"], **options)
        answer |= {"is_there": Path(answer["checkpoint"]).is_dir(), "encoded": sum(encoded)}
    except DiffpruneError as error:
        if "gone" in request:
            raise
        answer = {"error": str(error)}
    training_loop.save_checkpoint = save_checkpoint
    reports = Path(request.get("reports", request["out"]))
    reports.mkdir(parents=True, exist_ok=True)
    (reports / f"report-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(answer))
