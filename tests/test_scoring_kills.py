"""`score` killed with SIGKILL, at random moments and around every rename, ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_scores import small_dit
from test_scoring import write_checkpoint, write_latents

from diffprune.draws import hash_keys
from diffprune.scores.batches import Samples

SHARDS = 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_was_killed_20_times_at_random_points_ends_with_the_same_bytes(tmp_path):
    generator = torch.Generator().manual_seed(3)
    keys = [f"{i:03d}" for i in range(SHARDS * 5)]
    labels = torch.randint(0, 5, (len(keys),), generator=generator)
    samples = Samples(hash_keys(keys), torch.randn(len(keys), 4, 8, 8, generator=generator).half().float(), labels)
    shards = torch.arange(len(keys)).view(SHARDS, 5).tolist()
    write_latents(tmp_path / "latents", shards, keys, samples)
    for step in (200, 400):
        write_checkpoint(tmp_path / "run", step, small_dit(5, seed=step, depth=1))
    script = Path(__file__).with_name("killed_scoring.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["files"] == [*(f"shard-{number}.parquet" for number in range(SHARDS)), "stage.json"]
    assert found["different"] == []
    assert found["by_time"] == 20 and found["by_rename"] >= 4
