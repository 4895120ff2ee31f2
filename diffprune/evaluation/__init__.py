"""How good, how varied and how original generated images are, measured in the space of an embedder.

Every metric is a function of feature tensors [N, D]; ``evaluate`` runs all of them over two embedding folders.
"""

from __future__ import annotations

from diffprune.evaluation.classes import class_balance, knn_classes
from diffprune.evaluation.frechet import frechet_distance, frechet_distance_infinity
from diffprune.evaluation.gaussians import Gaussian
from diffprune.evaluation.manifold import precision_recall
from diffprune.evaluation.mmd import kernel_distance
from diffprune.evaluation.nearest_training import memorization
from diffprune.evaluation.run import evaluate
from diffprune.evaluation.same_seed import same_seed_similarity
from diffprune.evaluation.vendi import vendi_score, vendi_scores

__all__ = [
    "Gaussian",
    "class_balance",
    "evaluate",
    "frechet_distance",
    "frechet_distance_infinity",
    "kernel_distance",
    "knn_classes",
    "memorization",
    "precision_recall",
    "same_seed_similarity",
    "vendi_score",
    "vendi_scores",
]
