"""The ops a backend has to provide, and nothing else: this package imports torch alone.

Each op is a ``torch.library.custom_op`` ``diffprune::<op>``. Its contract is the docstring in ``kernels/<op>.py``;
``kernels/reference/<op>.py`` is its definition in code; ``dispatch`` says which implementation runs.
"""

from diffprune.kernels.dispatch import report
from diffprune.kernels.kmeans_assign import kmeans_assign
from diffprune.kernels.kmeans_update import kmeans_update
from diffprune.kernels.linear_grad_dot import linear_grad_dot
from diffprune.kernels.linear_grad_sqnorm import linear_grad_sqnorm
from diffprune.kernels.pairwise_topk import pairwise_topk

__all__ = ["kmeans_assign", "kmeans_update", "linear_grad_dot", "linear_grad_sqnorm", "pairwise_topk", "report"]
