"""The ops a backend has to provide, and nothing else: this package imports torch, and diffprune's errors.

Each op is ``torch.ops.diffprune.<op>``, registered by ``registration``: what ``torch.library.custom_op`` gives, but
for a second's import at the first call. Its contract is the docstring in ``kernels/<op>.py``;
``kernels/reference/<op>.py`` is its definition in code; ``dispatch`` says which implementation runs.
"""

from diffprune.kernels.adaln_modulate import adaln_modulate
from diffprune.kernels.attention import attention
from diffprune.kernels.dispatch import report
from diffprune.kernels.flow_interpolate import flow_interpolate
from diffprune.kernels.flow_matching_loss import flow_matching_loss, flow_matching_loss_grad
from diffprune.kernels.gated_residual import gated_residual
from diffprune.kernels.gated_residual_adaln import gated_residual_adaln
from diffprune.kernels.kmeans_assign import kmeans_assign
from diffprune.kernels.kmeans_update import kmeans_update
from diffprune.kernels.kmeans_update_delta import kmeans_update_delta
from diffprune.kernels.knn_radius import knn_radius
from diffprune.kernels.linear_grad_dot import linear_grad_dot
from diffprune.kernels.linear_grad_sqnorm import linear_grad_sqnorm
from diffprune.kernels.linear_grad_sqnorm_dot import linear_grad_sqnorm_dot
from diffprune.kernels.pairwise_topk import pairwise_topk

__all__ = [
    "adaln_modulate",
    "attention",
    "flow_interpolate",
    "flow_matching_loss",
    "flow_matching_loss_grad",
    "gated_residual",
    "gated_residual_adaln",
    "kmeans_assign",
    "kmeans_update",
    "kmeans_update_delta",
    "knn_radius",
    "linear_grad_dot",
    "linear_grad_sqnorm",
    "linear_grad_sqnorm_dot",
    "pairwise_topk",
    "report",
]
