"""A Ray cluster of three nodes on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@contextmanager
def three_nodes(*folders: Path) -> Iterator[tuple[Any, list[Any]]]:
    """The cluster, and the two nodes that the driver is not on. Its processes import from ``folders`` and the tests."""
    import ray
    from ray.cluster_utils import Cluster

    tests, before = Path(__file__).parent, dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join(map(str, (*folders, tests.parent, tests))), "OMP_NUM_THREADS": "1"}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        yield made, [made.add_node(**NODE) for _ in range(2)]
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)
