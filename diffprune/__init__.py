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

from diffprune._version import __version__

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


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffprune' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
