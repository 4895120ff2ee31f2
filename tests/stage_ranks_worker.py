"""What test_stage_ranks.py starts with torchrun: stages of a small run, or k-means on points of its own.

python -m torch.distributed.run --nproc-per-node N tests/stage_ranks_worker.py REQUEST.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

import diffprune
from diffprune.errors import DiffpruneError
from diffprune.kmeans import KMeans
from diffprune.progress import set_enabled
from diffprune.rank_talk import RankTalk, leave


def threading_now() -> int:
    """Threads of this process, C++'s too."""
    return len(list(Path("/proc/self/task").iterdir()))


torch.set_num_threads(1)
set_enabled(False)
talk = RankTalk.of_torchrun()
for request in json.loads(Path(sys.argv[1]).read_text()):
    if request["stage"] == "kmeans":
        points = np.load(request["points"])
        bounds = [0, *request["bounds"][str(talk.size)], len(points)]
        own = points[bounds[talk.rank] : bounds[talk.rank + 1]]
        kmeans = KMeans(**request["options"]).fit(own, talk=talk)
        result = {
            "centroids": kmeans.centroids_.tobytes().hex(),
            "assignment": talk.gather(torch.from_numpy(kmeans.assignment_)).tolist(),
            "distance": talk.gather(torch.from_numpy(kmeans.distance_)).numpy().tobytes().hex(),
            "about": [kmeans.inertia_, kmeans.n_iter_, kmeans.moved_],
        }
    else:
        try:
            result = getattr(diffprune, request["stage"])(*request["arguments"], **request["options"])
        except DiffpruneError as error:
            result = {"error": str(error)}
    Path(f"{request['answer']}-{talk.rank}.json").write_text(json.dumps(result))
threads = threading_now()
leave()
Path(f"{sys.argv[1]}-threads-{talk.rank}.json").write_text(json.dumps([threads, threading_now()]))
