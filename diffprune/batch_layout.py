"""Where in a tensor the samples are, and where torch functions that move dimensions put them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Layout(NamedTuple):
    """Dimension `dim` counts outer · rows · inner: index = (o · rows + row) · inner + i."""

    dim: int
    inner: int = 1


BATCH_FIRST = Layout(0)


def batch_first(tensor: Tensor, layout: Layout, rows: int) -> Tensor:
    """[..., outer·rows·inner, ...] -> [rows, ..., outer, inner, ...], a view."""
    return tensor.unflatten(layout.dim, (-1, rows, layout.inner)).movedim(layout.dim + 1, 0)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `function` of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, tuple):  # a named tuple that a torch function returns
        return type(value)(map_tensors(function, item) for item in tuple(value))
    if type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def moved(
    func: Callable, args: tuple, kwargs: dict, source: Tensor, layout: Layout, output: Tensor, rows: int
) -> Layout | None:
    """Where one of MOVING puts the batch of `source`, its first argument. None: it is whole nowhere."""
    dim, shape, new = layout.dim, source.shape, output.shape
    if func in PERMUTING:
        probe = torch.empty([2 if i == dim else 1 for i in range(len(shape))], device="meta")
        image = next(tensors_in(func(probe, *args[1:], **kwargs)))
        return Layout(image.shape.index(2), layout.inner) if 2 in image.shape else None  # unbound: each row apart
    if func in INDEXING:
        return indexed(args[1], layout, shape, rows)
    if func in REPEATING:
        return Layout(dim + len(new) - len(shape), layout.inner)  # the whole dimension again: more of `outer`
    if func in INTERLEAVING:
        return _interleaved(shape, layout, *args[1:], **kwargs)
    return _reshaped(shape, layout, new, rows) if output.numel() == source.numel() else None


def _reshaped(shape: tuple, layout: Layout, new: tuple, rows: int) -> Layout | None:
    """A reshape keeps the elements' order, in which a row is `stride` elements that repeat every rows·stride."""
    stride = layout.inner * math.prod(shape[layout.dim + 1 :])
    for dim in range(len(new)):
        rest = math.prod(new[dim + 1 :])
        if rest and stride % rest == 0 and new[dim] * rest % (rows * stride) == 0:
            return Layout(dim, stride // rest)
    return None


def _interleaved(
    shape: tuple, layout: Layout, repeats: Any = None, dim: int | None = None, output_size: int | None = None
) -> Layout | None:
    """The signature is `repeat_interleave`'s: elements of a dimension beside their copies."""
    if dim is None and len(shape) > 1:
        return None
    if (dim or 0) % len(shape) != layout.dim:
        return layout
    return Layout(layout.dim, layout.inner * repeats) if type(repeats) is int else None


def indexed(index: Any, layout: Layout, shape: tuple, rows: int) -> Layout | None:
    """`tensor[index]` for integers, slices, None and an ellipsis that leave the batch whole."""
    index = index if isinstance(index, tuple) else (index,)
    if any(not (item is None or item is Ellipsis or type(item) in (int, slice)) for item in index):
        return layout if layout.dim == 0 and type(index[0]) is slice and index[0] == slice(None) else None
    for target, source, item in _index_places(index, len(shape)):
        if source == layout.dim:
            whole = type(item) is slice and _is_whole(item, shape[source], rows * layout.inner)
            return Layout(target, layout.inner) if whole else None
    return None


def picked(index: Any, layout: Layout, dims: int, rows: int) -> Layout | None:
    """`tensor[index]` where tensors pick of each row something of that row: `x[torch.arange(B), last]`."""
    index = index if isinstance(index, tuple) else (index,)
    tensors = [item for item in index if isinstance(item, Tensor)]
    if layout.inner != 1 or layout.dim or not tensors or index[0] is not tensors[0]:
        return None
    if any(item.dtype == torch.bool for item in tensors) or any(
        a is not b for a, b in zip(index, tensors, strict=False)
    ):
        return None
    own, shape = tensors[0], torch.broadcast_shapes(*(item.shape for item in tensors))
    dim = next((dim for dim in range(own.dim()) if own.shape[dim] == own.numel() == rows), None)
    if dim is None or not torch.equal(own.flatten(), torch.arange(rows, device=own.device)):
        return None
    return Layout(dim + len(shape) - own.dim())


def written(index: Any, shape: tuple, value: Tensor, layout: Layout) -> Layout | None:
    """Where `tensor[index] = value` puts the batch of `value` in a tensor of `shape`."""
    index = index if isinstance(index, tuple) else (index,)
    if any(not (item is None or item is Ellipsis or type(item) in (int, slice)) for item in index):
        return None
    places = [(target, source) for target, source, item in _index_places(index, len(shape)) if type(item) is slice]
    dims = 1 + max((target for target, _ in places), default=-1)
    for target, source in places:
        if target == layout.dim + dims - value.dim() and shape[source] == value.shape[layout.dim]:
            return Layout(source, layout.inner)
    return None


def _index_places(index: tuple, dims: int) -> Iterator[tuple[int, int, int | slice]]:
    """For each dimension of the tensor: its place in ``tensor[index]``, its own, and what indexes it."""
    given = sum(item is not None and item is not Ellipsis for item in index)
    source = target = 0
    for item in (*index, *([] if Ellipsis in index else [Ellipsis])):
        if item is None:
            target += 1
            continue
        for _ in range(dims - given if item is Ellipsis else 1):
            yield target, source, slice(None) if item is Ellipsis else item
            source += 1
            target += type(item) is not int


def _is_whole(item: slice, size: int, unit: int) -> bool:
    """Whether a slice keeps whole batches only, of `unit` elements each."""
    start, stop, step = item.indices(size)
    return step == 1 and start < stop and start % unit == 0 and stop % unit == 0


def along(func: Callable, args: tuple, kwargs: dict, source: Tensor, layout: Layout) -> bool:
    """Whether one of JOINING or SPLITTING is along the dimension of the batch."""
    place = JOINING.get(func) or SPLITTING[func]
    return kwargs.get("dim", args[place] if len(args) > place else 0) % source.dim() == layout.dim


def split(source: Tensor, layout: Layout, outputs: list[Tensor], rows: int) -> bool:
    """Whether parts of `source`, views of it, are whole batches."""
    unit = rows * layout.inner
    step = unit * source.stride(layout.dim)
    return all(
        x.numel() and x.shape[layout.dim] % unit == 0 and (x.storage_offset() - source.storage_offset()) % step == 0
        for x in outputs
    )


def token_by_token(func: Callable, args: tuple, sources: list[Tensor], layout: Layout) -> bool:
    """Whether a linear layer or a normalisation takes vectors without the batch in them, and leaves them in place."""
    if len(sources) != 1 or not args or sources[0] is not args[0]:
        return False
    features = 1 if func is F.linear else len(args[1]) if func in (F.layer_norm, torch.layer_norm) else None
    return features is not None and layout.dim < args[0].dim() - features


def strided(source: Tensor, layout: Layout, output: Tensor) -> bool:
    """Whether a view by strides has the batch where `source` has it: all else steps within a row or over all rows."""
    dim, size, step = layout.dim, source.shape[layout.dim], source.stride(layout.dim)
    if dim >= output.dim() or output.shape[dim] != size or output.stride(dim) != step or not step:
        return False
    others = [(n, stride) for i, (n, stride) in enumerate(zip(output.shape, output.stride(), strict=True)) if i != dim]
    within = sum((n - 1) * stride for n, stride in others if stride % (size * step))
    return (output.storage_offset() - source.storage_offset()) % (size * step) + within < step


def displaced_dims(func: Callable, args: tuple, kwargs: dict) -> set[int]:
    """The dimensions of ``args[0]`` along which elements get other places; all where none is named or usual."""
    dims, place = args[0].dim(), DISPLACING[func]
    given = kwargs.get("dim", kwargs.get("dims", () if place is None else args[place:]))
    given = [given] if isinstance(given, int) else [one for one in given or () if isinstance(one, (int, tuple, list))]
    named = [dim for one in given for dim in ([one] if isinstance(one, int) else one)]
    return {dim % max(1, dims) for dim in named or ([-1] if func in _ALONG_THE_LAST else range(dims))}


def _functions(names: str) -> set[Callable]:
    """By name, in place too."""
    owners = (torch, Tensor, torch.nn.functional, torch._C._nn)
    every = [one for name in names.replace(",", " ").split() for one in (name, f"{name}_")]
    return {getattr(owner, name) for name in every for owner in owners if hasattr(owner, name)}


def _places(**places: int | None) -> dict[Callable, int | None]:
    return {func: place for name, place in places.items() for func in _functions(name)}


PERMUTING = _functions("transpose permute swapaxes swapdims movedim moveaxis t unbind adjoint") | {
    Tensor.T.__get__,
    Tensor.mT.__get__,
    Tensor.H.__get__,
    Tensor.mH.__get__,
}
RESHAPING = _functions("view reshape flatten unflatten unsqueeze squeeze view_as reshape_as")
REPEATING = _functions("repeat tile expand expand_as broadcast_to")
INTERLEAVING = _functions("repeat_interleave")
INDEXING = {Tensor.__getitem__}
MOVING = PERMUTING | RESHAPING | REPEATING | INTERLEAVING | INDEXING
# Where in their arguments the dimension stands.
JOINING = _places(cat=1, concat=1, concatenate=1)
SPLITTING = _places(chunk=2, narrow=1, split_with_sizes=2) | {torch._VF.split: 2, torch._VF.split_with_sizes: 2}
# Of what they are given beside the first tensor, these take the type or the shape alone.
LENDING = _functions("to type type_as")
# New tensors: no value of another enters them. Those "like" another have its rows.
LIKE = _functions("zeros_like ones_like full_like rand_like randn_like randint_like empty_like")
NEW = _functions("new_zeros new_ones new_full new_empty new_tensor")
# Functions that give elements another place, and where in their arguments the dimension stands (None: in all of them).
WRITING = _places(
    index_add=1, index_copy=1, scatter=1, scatter_add=1, scatter_reduce=1, index_put=None, masked_scatter=None
)
DISPLACING = (
    WRITING
    | _places(index_select=1, gather=1, flip=1, sort=1, argsort=1, msort=None, topk=2, take_along_dim=2, roll=2)
    | _places(masked_select=None, take=None, rot90=None, fliplr=None, flipud=None)
    | {torch.fft.fftshift: None, torch.fft.ifftshift: None}
)
FOLLOWING = _functions("gather take_along_dim")  # the output is as long as the index, whatever the input is
FACTORIES = {torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.eye}
STRIDING = _functions("as_strided")
_ALONG_THE_LAST = _functions("sort argsort topk")  # unless another is named
ARITHMETIC = _functions("add sub mul div true_divide")
POINTWISE = ARITHMETIC | _functions(
    "rsub pow fmod remainder floor_divide maximum minimum max min where addcmul addcdiv lerp atan2 hypot "
    "eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_not masked_fill "
    "clamp clip clamp_min clamp_max to type type_as float double half bfloat16 int long bool cpu cuda contiguous "
    "clone detach requires_grad neg abs sign square sqrt rsqrt reciprocal exp expm1 log log1p log2 sin cos tan tanh "
    "sinh cosh asin acos atan sigmoid erf floor ceil round trunc nan_to_num isnan isinf isfinite logit conj angle "
    "relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus softshrink threshold "
    "logsigmoid log_sigmoid dropout feature_dropout alpha_dropout prelu polar complex positive sgn "
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy_with_logits"
)
POINTWISE -= _functions("max min")  # with one tensor and a dimension, they are not
POINTWISE |= {getattr(Tensor, name).__get__ for name in ("real", "imag", "data", "grad")}
# Where two tensors meet whose samples do not lie along one dimension, these mix samples.
PRODUCTS = _functions(
    "matmul mm bmm baddbmm addmm dot mv einsum tensordot cdist linear scaled_dot_product_attention"
) | {
    torch._VF.einsum,
    torch._VF.tensordot,
    torch._VF.cdist,
}
