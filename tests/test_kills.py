"""A few kills in each stage; `tests/soak/kills.py` does many, and says how it is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_stages_that_are_killed_go_on_to_the_same_bytes(tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = ["--kills", "3", "--worker-kills", "0", "--json", str(tmp_path / "counts.json")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.kills", *options],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())["stages"]
    assert set(counts) == {"pack", "encode", "embed", "score", "cluster", "prune", "sample", "train"}
    assert all(count["drivers"] == 3 and not count["lost"] for count in counts.values())
