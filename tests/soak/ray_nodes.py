"""Nodes of a Ray cluster killed at random moments: the run ends by itself, with the bytes of one process.

    python -m tests.soak.ray_nodes --kills 12

Three nodes on this machine, one with the driver. While a stage runs, one of the other two is killed; another one takes
its place before the next run. Needs the extra ``ray``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from ray_cluster import NODE, three_nodes
from small_run import SmallRun, contents
from soak_options import soak_parser

from tests.soak.kills import METHODS, prepare


def main() -> None:
    parser = soak_parser(__doc__)
    parser.add_argument("--kills", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = prepare(Path(folder))
        with three_nodes() as (cluster, nodes):
            rows = [
                kill_nodes(name, run, Path(folder), cluster, nodes, arguments)
                for name, run in stages(small, cluster.address).items()
            ]
    for row in rows:
        print(f"{row['what']:<40}{row['tried']:>6}{row['lost']:>6}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}))
    sys.exit(any(row["lost"] for row in rows))


def stages(small: SmallRun, address: str) -> dict[str, Callable[[Path, bool], Any]]:
    """Name -> a function of the output folder, and of whether Ray runs it."""
    import diffprune

    def ray(on: bool) -> dict[str, Any]:
        return {"ray": address} if on else {}

    options = {"methods": METHODS, "draws": 2, "device": "cpu", "batch_size": 16}
    return {
        "encode": lambda out, on: diffprune.encode(small.shards, small.vqvae, out, **ray(on)),
        "embed": lambda out, on: diffprune.embed(small.shards, out, model=f"vqvae:{small.vqvae}", **ray(on)),
        "score": lambda out, on: diffprune.score(small.latents, small.surrogate, out, **options, **ray(on)),
    }


def kill_nodes(
    name: str,
    run: Callable[[Path, bool], Any],
    root: Path,
    cluster: Any,
    nodes: list[Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One stage, until its share of the kills has hit it while it ran."""
    rng = random.Random(f"{arguments.seed} {name}")
    run(root / name, False)
    expected = contents(root / name)
    began = time.monotonic()
    run(root / "warm", True)
    took = time.monotonic() - began
    shutil.rmtree(root / "warm")
    tried, lost = 0, 0
    while tried < -(-arguments.kills // 3):
        out, node = root / f"{name}-ray", nodes.pop(rng.randrange(len(nodes)))
        killed: list[Any] = []

        def kill(node: Any = node, killed: list[Any] = killed) -> None:
            killed.append(node)
            cluster.remove_node(node, allow_graceful=False)

        timer = threading.Timer(rng.uniform(0, took), kill)
        timer.start()
        run(out, True)
        timer.cancel()
        timer.join()
        lost += contents(out) != expected
        shutil.rmtree(out)
        if killed:
            tried += 1
            node = cluster.add_node(**NODE)
        nodes.append(node)
    return {"what": f"`{name}` on Ray, a node killed", "tried": tried, "survived": tried - lost, "lost": lost}


if __name__ == "__main__":
    main()
