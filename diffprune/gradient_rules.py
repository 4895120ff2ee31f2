"""What each kind of layer adds to a sample's gradient norm and dot product. To cover another kind, add a `Rule`."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffprune.kernels import linear_grad_dot, linear_grad_sqnorm


class Rule:
    """How one kind of layer turns what it saw and the gradient of what it returned into per-sample sums.

    `tokens` brings one call into the form (seen [rows, T, ...], gradient [rows, T, ...]) in which a row's gradient is
    a sum over T. Calls are joined, and the rows of a sample folded, along T before `sqnorm` and `dot` run.
    """

    def refusal(self, module: nn.Module) -> str | None:
        """Why this module is not covered, or None."""
        return None

    def min_dim(self, module: nn.Module) -> int:
        """How many dimensions the module's input has at least where the first one is a batch."""
        return 2

    def tokens(self, module: nn.Module, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def sqnorm(self, seen: Tensor, gradient: Tensor, parameters: Set[str]) -> Tensor:
        """[B]: squared norm over the trainable parameters, given by their names in the module."""
        raise NotImplementedError

    def dot(self, seen: Tensor, gradient: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
        """[B]: dot product with a direction, by the parameters' names in the module."""
        raise NotImplementedError

    def total(self, seen: Tensor, gradient: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name in the module -> float64 sum over samples of the gradient, flattened or in the parameter's shape."""
        raise NotImplementedError


class LinearRule(Rule):
    def tokens(self, module: nn.Module, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return input.reshape(len(input), -1, input.shape[-1]), gradient.reshape(len(input), -1, gradient.shape[-1])

    def sqnorm(self, seen: Tensor, gradient: Tensor, parameters: Set[str]) -> Tensor:
        if "weight" in parameters:
            return linear_grad_sqnorm(seen, gradient, "bias" in parameters)
        return gradient.double().sum(dim=1).square().sum(dim=1)

    def dot(self, seen: Tensor, gradient: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
        if "weight" in direction:
            return linear_grad_dot(seen, gradient, direction["weight"].flatten(1), direction.get("bias"))
        return gradient.double().sum(dim=1) @ direction["bias"].double()

    def total(self, seen: Tensor, gradient: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen, gradient = seen.flatten(0, 1).double(), gradient.flatten(0, 1).double()
        return {"weight": gradient.mT @ seen, "bias": gradient.sum(dim=0)}


class Conv2dRule(LinearRule):
    """A convolution is a linear layer over its unfolded patches."""

    def min_dim(self, module: nn.Module) -> int:
        return 4

    def refusal(self, module: nn.Module) -> str | None:
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return "expected groups=1 and zero padding given in numbers"
        return None

    def tokens(self, module: nn.Module, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        patches = F.unfold(input, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2), gradient.flatten(2).transpose(1, 2)


class EmbeddingRule(Rule):
    def min_dim(self, module: nn.Module) -> int:
        return 1

    def refusal(self, module: nn.Module) -> str | None:
        if module.max_norm is not None or module.scale_grad_by_freq:
            return "expected max_norm=None and scale_grad_by_freq=False"
        return None

    def tokens(self, module: nn.Module, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows = input.reshape(len(input), -1)
        gradient = gradient.reshape(*rows.shape, -1)
        if module.padding_idx is not None:
            gradient = gradient.masked_fill((rows == module.padding_idx)[..., None], 0)
        return rows, gradient

    def sqnorm(self, seen: Tensor, gradient: Tensor, parameters: Set[str]) -> Tensor:
        same = seen[:, :, None] == seen[:, None, :]  # tokens that hit one row of the table add up before the norm
        gradient = gradient.double()
        return (same * (gradient @ gradient.mT)).sum(dim=(1, 2))

    def dot(self, seen: Tensor, gradient: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
        return (direction["weight"].double()[seen] * gradient.double()).sum(dim=(1, 2))

    def total(self, seen: Tensor, gradient: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hit = F.one_hot(seen.flatten(), len(parameters["weight"])).double()  # index_add's order varies on a GPU
        return {"weight": hit.mT @ gradient.flatten(0, 1).double()}


class AffineRule(Rule):
    """Scale and shift, feature by feature, of something normalised: small enough to be written out."""

    def sqnorm(self, seen: Tensor, gradient: Tensor, parameters: Set[str]) -> Tensor:
        parts = self._gradients(seen, gradient)
        return torch.stack([parts[name].square().sum(dim=1) for name in parameters]).sum(dim=0)

    def dot(self, seen: Tensor, gradient: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
        parts = self._gradients(seen, gradient)
        return torch.stack([parts[name] @ value.double().flatten() for name, value in direction.items()]).sum(dim=0)

    def total(self, seen: Tensor, gradient: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.sum(dim=0) for name, value in self._gradients(seen, gradient).items()}

    def _gradients(self, seen: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        gradient = gradient.double()
        return {"weight": (seen.double() * gradient).sum(dim=1), "bias": gradient.sum(dim=1)}


class LayerNormRule(AffineRule):
    def min_dim(self, module: nn.Module) -> int:
        return len(module.normalized_shape) + 1

    def tokens(self, module: nn.Module, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        features = module.weight.numel()
        seen = F.layer_norm(input, module.normalized_shape, eps=module.eps)
        return seen.reshape(len(input), -1, features), gradient.reshape(len(input), -1, features)


class GroupNormRule(AffineRule):
    def tokens(self, module: nn.Module, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        seen = F.group_norm(input, module.num_groups, eps=module.eps)
        seen, gradient = (x.reshape(*x.shape[:2], -1).transpose(1, 2) for x in (seen, gradient))
        return seen, gradient


# By exact type: a subclass may compute something else, or be used without its forward (MultiheadAttention.out_proj).
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.Conv2d: Conv2dRule(),
    nn.Embedding: EmbeddingRule(),
    nn.LayerNorm: LayerNormRule(),
    nn.GroupNorm: GroupNormRule(),
}
