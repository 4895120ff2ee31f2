"""DiTs in diffusers' folders, under this package's names, which are the published ones.

diffusers' copies of the published DiTs hold the published weights: q, k and v apart, the timestep's and label's
embedders once more in every block, and no position table. Its own network is not quite the published one: it spaces the
timestep's 128 frequencies over 127 steps, and its second norm's epsilon is 1e-5. A DiT here is the published network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from diffprune.config import DitConfig
from diffprune.errors import InputError
from diffprune.files import read_json
from diffprune.models.positions import sincos_position_embedding
from diffprune.storage import AnyPath
from diffprune.weight_files import diffusers_folder, substituted

_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # before the first existed it was the second
_ONLY = {
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_eps": (1e-5, 1e-6),
    "norm_elementwise_affine": (False,),
    "attention_bias": (True,),
}
_NAMES = [
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^transformer_blocks\.0\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer_blocks\.(\d+)\.attn1\.", r"blocks.\1.attn."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out_2\.", "final_layer.linear."),
]


def diffusers_dit_folder(path: AnyPath) -> AnyPath | None:
    """Where diffusers' ``config.json`` lies: in ``path``, or in ``transformer`` of a pipeline's folder; else None."""
    if path.suffix in (".pt", ".pth", ".ckpt", ".safetensors"):
        return None
    return diffusers_folder(path, "transformer")


def check_diffusers_config(path: AnyPath, config: DitConfig) -> None:
    """Raise InputError unless diffusers' ``config.json`` says a DiT and, where tensors don't show it, ``config``'s."""
    fields = read_json(path)
    found = fields.get("_class_name", "none") if isinstance(fields, dict) else type(fields).__name__
    if found not in _CLASSES:
        raise InputError(f"{path}: _class_name: expected {_CLASSES[0]} of diffusers, found {found!r}")
    for name, values in _ONLY.items():
        if name in fields and fields[name] not in values:
            raise InputError(f"{path}: {name}: expected {' or '.join(map(str, values))}, found {fields[name]!r}")
    expected = {"num_attention_heads": ("num_heads", 16), "sample_size": ("input_size", 32)}  # diffusers' defaults
    for name, (ours, default) in expected.items():
        if fields.get(name, default) != getattr(config, ours):
            raise InputError(
                f"{path}: {name}: expected {getattr(config, ours)}, the model's {ours}, found {fields.get(name)!r}"
            )
    if config.rope:  # which no tensor shows; queries' norms are missed as tensors
        raise InputError(f"{path}: expected model.rope=false, as in every DiT of diffusers, found true")


def published_names(tensors: dict[str, Tensor], config: DitConfig, path: AnyPath) -> dict[str, Tensor]:
    """The state dict of a ``DiTTransformer2DModel`` under the published names.

    Raises: InputError where blocks have different embedders, as after a training in diffusers: a DiT has one.
    """
    side = config.input_size // config.patch_size
    renamed = {"pos_embed": sincos_position_embedding(side, config.hidden_size).unsqueeze(0)}
    for name, value in _with_one_embedder(tensors, path):
        renamed[substituted(name, _NAMES)] = value
    for name in [name for name in renamed if re.search(r"\.attn\.to_q\.(weight|bias)$", name)]:
        names = [name.replace("to_q", f"to_{one}") for one in "qkv"]
        if all(one in renamed for one in names):  # else they are told to be no part of a DiT
            renamed[name.replace("to_q", "qkv")] = torch.cat([renamed.pop(one) for one in names])
    return renamed


def _with_one_embedder(tensors: dict[str, Tensor], path: AnyPath) -> Iterable[tuple[str, Tensor]]:
    for name, value in tensors.items():
        first = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name)
        if first == name:
            yield name, value
        elif first not in tensors or not torch.equal(tensors[first], value):
            raise InputError(
                f"{path}: tensor {name!r}: expected block 0's values, as in diffusers' copies of the published DiTs, "
                "found others; a DiT has one embedder for all blocks"
            )
