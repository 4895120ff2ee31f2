"""diffprune: score every image of a diffusion model's training set, and keep the ones that matter.

Each step of the pipeline is a function here and a verb of the command line of the same name::

    import diffprune

    diffprune.pack("photos/", "shards/")
    diffprune.embed("shards/", "embeddings/", model="openai/clip-vit-large-patch14")
    diffprune.cluster("embeddings/", "clusters/", k=1000)
    diffprune.select("clusters/", "kept.parquet", order="equal", prune=0.9)
    diffprune.prune("kept.parquet", "shards/", "pruned/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from diffprune._version import __version__

if TYPE_CHECKING:  # what editors and type checkers see of the names below
    from diffprune.cluster_count import choose_k as choose_k
    from diffprune.clustering import cluster as cluster
    from diffprune.conversion import convert as convert
    from diffprune.diagnosis import doctor as doctor
    from diffprune.encoding import embed as embed
    from diffprune.encoding import encode as encode
    from diffprune.errors import BusyError as BusyError
    from diffprune.errors import DiffpruneError as DiffpruneError
    from diffprune.errors import DiskFullError as DiskFullError
    from diffprune.errors import InputError as InputError
    from diffprune.errors import RemoteError as RemoteError
    from diffprune.errors import ResumeError as ResumeError
    from diffprune.errors import StoppedError as StoppedError
    from diffprune.errors import WorkerError as WorkerError
    from diffprune.evaluation import evaluate as evaluate
    from diffprune.exporting import export as export
    from diffprune.hierarchical_kmeans import HierarchicalKMeans as HierarchicalKMeans
    from diffprune.kmeans import KMeans as KMeans
    from diffprune.live_latents import LiveLatents as LiveLatents
    from diffprune.packing import pack as pack
    from diffprune.per_sample import per_sample_gradients as per_sample_gradients
    from diffprune.pruning import prune as prune
    from diffprune.reconstruction import reconstruct as reconstruct
    from diffprune.reporting import report as report
    from diffprune.row_selection import select_rows as select_rows
    from diffprune.sampling import sample as sample
    from diffprune.scoring import score as score
    from diffprune.selection import select as select
    from diffprune.sweeping import sweep as sweep
    from diffprune.training import train_dit as train_dit
    from diffprune.training import train_vqvae as train_vqvae
    from diffprune.verification import verify as verify

# Public name -> module. Imported on first use, so that `import diffprune` does not import torch.
# No module has the name of a public function: `diffprune.select` must mean one thing.
_PUBLIC = {
    "pack": "diffprune.packing",
    "verify": "diffprune.verification",
    "train_vqvae": "diffprune.training",
    "train_dit": "diffprune.training",
    "convert": "diffprune.conversion",
    "encode": "diffprune.encoding",
    "embed": "diffprune.encoding",
    "score": "diffprune.scoring",
    "cluster": "diffprune.clustering",
    "choose_k": "diffprune.cluster_count",
    "select": "diffprune.selection",
    "select_rows": "diffprune.row_selection",
    "prune": "diffprune.pruning",
    "export": "diffprune.exporting",
    "reconstruct": "diffprune.reconstruction",
    "sample": "diffprune.sampling",
    "evaluate": "diffprune.evaluation",
    "report": "diffprune.reporting",
    "sweep": "diffprune.sweeping",
    "doctor": "diffprune.diagnosis",
    "LiveLatents": "diffprune.live_latents",
    "KMeans": "diffprune.kmeans",
    "HierarchicalKMeans": "diffprune.hierarchical_kmeans",
    "per_sample_gradients": "diffprune.per_sample",
    "DiffpruneError": "diffprune.errors",
    "InputError": "diffprune.errors",
    "ResumeError": "diffprune.errors",
    "BusyError": "diffprune.errors",
    "DiskFullError": "diffprune.errors",
    "RemoteError": "diffprune.errors",
    "StoppedError": "diffprune.errors",
    "WorkerError": "diffprune.errors",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


if not TYPE_CHECKING:  # or any name would do for a checker

    def __getattr__(name: str):
        if name not in _PUBLIC:
            raise AttributeError(f"module 'diffprune' has no attribute {name!r}")
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
