"""Autoencoders of other programs: diffusers' folders; state dicts of taming-transformers, latent diffusion, LlamaGen.

All are the network of ``models.taming`` under other names. Its shape is read off the tensors; what they don't show
comes from diffusers' ``config.json``, or is what taming-transformers and LlamaGen always have.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.checkpoints import STATE_FILE, filled
from diffprune.config import VqvaeConfig
from diffprune.errors import InputError
from diffprune.files import read_json, sha256_file
from diffprune.models.kl import KLAutoencoder, build_autoencoder
from diffprune.models.vqvae import VQVAE
from diffprune.storage import AnyPath, RemotePath, as_path, local_path
from diffprune.weight_files import (
    DIFFUSERS_WEIGHTS,
    diffusers_folder,
    in_float32,
    no_diffusers_weights,
    read_weights,
    substituted,
)

IMAGE_SIZE = 256  # what the published ones were trained at, where the file does not say
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_WITHIN = ("vae", "vqvae")  # of a pipeline's folder
_SIZED = re.compile(r"(.+)@(\d+)")

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ATTENTION |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # diffusers before 0.18
_DIFFUSERS_NAMES = [
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.attentions\.", r".down.\1.attn."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.attentions\.", r".up.\1.attn."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    *((rf"(\.attn(?:_1|\.\d+))\.{re.escape(old)}\.", rf"\1.{new}.") for old, new in _ATTENTION.items()),
]
_LLAMAGEN_NAMES = [
    (r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block."),
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^decoder\.conv_blocks\.(\d+)\.res\.", r"decoder.up.\1.block."),
    (r"^decoder\.conv_blocks\.", "decoder.up."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
]
# Fields of diffusers' config that say no more than the tensors do, or nothing about inference; those that have one
# value here.
_SHAPES = {"in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "latent_channels"}
_SHAPES |= {"layers_per_block", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"}
_SHAPES |= {"num_vq_embeddings", "vq_embed_dim", "force_upcast", "lookup_from_codebook"}
_READ = {"norm_num_groups", "sample_size", "scaling_factor", "shift_factor"}
_ONLY = {"act_fn": ("silu", "swish"), "norm_type": ("group",)}


def is_foreign_autoencoder(path: str | os.PathLike) -> bool:
    """Whether ``load_foreign_autoencoder`` is to read it: a file, or a folder with a ``config.json``."""
    path, _ = _split(path)
    if isinstance(path, RemotePath):  # which then says that it cannot be one
        return path.suffix in _SUFFIXES or (path / "config.json").is_file()
    if path.is_dir():
        return not (path / STATE_FILE).is_file() and diffusers_folder(path, *_WITHIN) is not None
    return path.is_file() or path.suffix in _SUFFIXES


def load_foreign_autoencoder(
    path: str | os.PathLike, device: torch.device | str = "cpu"
) -> tuple[VQVAE | KLAutoencoder, dict[str, Any]]:
    """An autoencoder from another program, in float32 and eval mode, and {"sha256", "path", "format"} of it.

    Args:
        path: a folder of diffusers' ``AutoencoderKL`` or ``VQModel`` (``config.json`` and
            ``diffusion_pytorch_model.safetensors``), or of a pipeline that has one under ``vae`` or ``vqvae``; or a
            ``.ckpt``, ``.pt`` or ``.safetensors`` with a state dict of taming-transformers (VQGAN), latent diffusion
            (its ``first_stage_model``) or LlamaGen. ``PATH@512`` is for images of 512 pixels; else they have the size
            that the config says, or 256.

    ``latent_scale`` is diffusers' ``scaling_factor``; NaN for a state dict, which has none. "sha256" covers the weights
    and what they mean: shape, scale, image size. LlamaGen's codes are of unit length, as all its published ones are.

    Raises: InputError for a file that is missing, damaged, hostile or of another network; it names the tensor or field.
    """
    path, size = _split(local_path(path, "a checkpoint"))
    if path.is_dir():
        folder = diffusers_folder(path, *_WITHIN) or path
        read, file = _diffusers_config(folder / "config.json"), folder / DIFFUSERS_WEIGHTS
        if not file.is_file():
            raise no_diffusers_weights(file)
        tensors, what = _renamed(read_weights(file), _DIFFUSERS_NAMES, "up_blocks"), "diffusers"
    else:
        read, file = _Read(IMAGE_SIZE, 32, math.nan, 0.0), path
        tensors, what = _published_names(read_weights(file, under=("ema", "model", "state_dict")))
    tensors = _completed(in_float32(tensors, file), read.scale, what == "llamagen", file)
    size = read.image_size if size is None else size
    config = _inferred_config(tensors, file, size, read.groups, read.shift, what == "llamagen")
    model = filled(lambda: build_autoencoder(config), tensors, file)
    scale = None if math.isnan(read.scale) else read.scale
    meaning = {"weights": sha256_file(file), "config": asdict(config), "scale": scale}
    sha256 = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
    return model.to(device), {"sha256": sha256, "path": str(path), "format": what}


def _split(path: str | os.PathLike) -> tuple[AnyPath, int | None]:
    """PATH@SIZE -> path and size."""
    match, given = _SIZED.fullmatch(os.fspath(path)), as_path(path)
    if match is None or given.exists():
        return given, None
    return as_path(match[1]), int(match[2])


class _Read(NamedTuple):
    """What a network's tensors do not say."""

    image_size: int
    groups: int  # of its normalisations
    scale: float  # of its latents; NaN if the file has none
    shift: float


def _diffusers_config(path: Path) -> _Read:
    """What ``config.json`` says, checked."""
    fields = read_json(path)
    if not isinstance(fields, dict) or fields.get("_class_name") not in ("AutoencoderKL", "VQModel"):
        found = fields.get("_class_name", "none") if isinstance(fields, dict) else type(fields).__name__
        raise InputError(f"{path}: _class_name: expected AutoencoderKL or VQModel of diffusers, found {found!r}")
    for name, value in fields.items():
        if name in _ONLY and value not in _ONLY[name]:
            raise InputError(f"{path}: {name}: expected {' or '.join(_ONLY[name])}, found {value!r}")
        unknown = name not in _SHAPES | _READ | _ONLY.keys() and not name.startswith("_")
        if unknown and value not in (None, False):
            raise InputError(f"{path}: {name}: {value!r} is not supported")
    scale = fields.get("scaling_factor", 0.18215)  # diffusers' default
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise InputError(f"{path}: scaling_factor: expected a positive number, found {scale!r}")
    shift = fields.get("shift_factor")
    if shift is not None and (type(shift) not in (int, float) or not abs(shift) < math.inf):
        raise InputError(f"{path}: shift_factor: expected a number or null, found {shift!r}")
    sides = fields.get("sample_size", IMAGE_SIZE)
    sides = sides if isinstance(sides, list) else [sides]
    if not sides or len(set(sides)) != 1 or type(sides[0]) is not int or sides[0] < 1:
        raise InputError(f"{path}: sample_size: expected the side of a square, found {fields['sample_size']!r}")
    groups = fields.get("norm_num_groups", 32)
    if type(groups) is not int or groups < 1:
        raise InputError(f"{path}: norm_num_groups: expected a positive number, found {groups!r}")
    return _Read(sides[0], groups, scale, shift or 0.0)


def _published_names(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A state dict of taming-transformers, latent diffusion or LlamaGen under taming-transformers' names."""
    prefix = "first_stage_model."  # of a whole latent diffusion model
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    # The rest: the discriminator and LPIPS of its training, averages of its weights, statistics.
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
    tensors = {name: value for name, value in (inner or tensors).items() if name.startswith(parts)}
    tensors.pop("quantize.codebook_used", None)
    if any(name.startswith("encoder.conv_blocks.") for name in tensors):
        return _renamed(tensors, _LLAMAGEN_NAMES, "conv_blocks"), "llamagen"
    return _renamed(tensors, [], ""), "taming"


def _renamed(tensors: dict[str, Tensor], rules: list[tuple[str, str]], upwards: str) -> dict[str, Tensor]:
    """The tensors under taming-transformers' names and shapes. ``upwards``: what the decoder's levels are called in a
    program that numbers them from the bottom, as taming-transformers does not."""
    numbers = {int(found[1]) for name in tensors if (found := re.match(rf"decoder\.{upwards}\.(\d+)\.", name))}
    renamed = {}
    for name, value in tensors.items():
        if upwards and (found := re.match(rf"decoder\.{upwards}\.(\d+)\.", name)):
            name = f"decoder.{upwards}.{max(numbers) - int(found[1])}.{name[found.end() :]}"
        name = substituted(name, rules)
        if re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name) and value.dim() == 2:
            value = value[:, :, None, None]  # a linear layer as a 1×1 convolution
        renamed["codebook" if name == "quantize.embedding.weight" else name] = value
    return renamed


def _completed(tensors: dict[str, Tensor], scale: float, unit_codes: bool, path: Path) -> dict[str, Tensor]:
    """With the tensors that a model of ours has beside the published ones."""
    if "quantize.embed.weight" in tensors:
        raise InputError(
            f"{path}: a VQGAN with Gumbel-softmax codes, which is not supported; use one with nearest codes"
        )
    tensors = {**tensors, "latent_scale": torch.tensor(scale)}
    encoder, decoder = (_of(tensors, f"{part}.weight", 4, path) for part in ("encoder.conv_out", "decoder.conv_in"))
    if "codebook" in tensors:
        codebook = _of(tensors, "codebook", 2, path)
        codebook = F.normalize(codebook, dim=1) if unit_codes else codebook
        tensors |= {"codebook": codebook, "code_sums": codebook.clone(), "code_counts": torch.ones(len(codebook))}
    for name, channels in (("quant_conv", encoder.shape[0]), ("post_quant_conv", decoder.shape[1])):
        if not any(key.startswith(f"{name}.") for key in tensors):  # Stable Diffusion 3 has none: the identity
            tensors[f"{name}.weight"] = torch.eye(channels)[:, :, None, None]
            tensors[f"{name}.bias"] = torch.zeros(channels)
    return tensors


def _inferred_config(
    tensors: dict[str, Tensor], path: Path, size: int, groups: int, shift: float, unit_codes: bool
) -> VqvaeConfig:
    first = _of(tensors, "encoder.conv_in.weight", 4, path)
    base, widths, blocks = first.shape[0], [], 0
    while (name := f"encoder.down.{len(widths)}.block.0.conv1.weight") in tensors:
        widths.append(_of(tensors, name, 4, path).shape[0])
    while f"encoder.down.0.block.{blocks}.conv1.weight" in tensors:
        blocks += 1
    if not widths or not base or any(width % base for width in widths):
        raise InputError(
            f"{path}: expected the encoder of a VQGAN, of latent diffusion's or of diffusers' autoencoder, whose "
            f"levels have multiples of the first convolution's channels, found {base} and {widths}"
        )
    per_channel = 1 if "codebook" in tensors else 2
    try:
        return VqvaeConfig(
            kind="vq" if "codebook" in tensors else "kl",
            backbone="taming",
            image_size=size,
            in_channels=first.shape[1],
            base_channels=base,
            channel_multipliers=tuple(width // base for width in widths),
            blocks_per_level=blocks,
            attention_levels=tuple(i for i in range(len(widths)) if f"encoder.down.{i}.attn.0.q.weight" in tensors),
            mid_attention="encoder.mid.attn_1.q.weight" in tensors,
            norm_groups=groups,
            z_channels=_of(tensors, "decoder.conv_in.weight", 4, path).shape[1],
            latent_channels=_of(tensors, "quant_conv.weight", 4, path).shape[0] // per_channel,
            latent_shift=float(shift),
            codebook_size=len(tensors["codebook"]) if "codebook" in tensors else VqvaeConfig.codebook_size,
            normalize_codes=unit_codes,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _of(tensors: dict[str, Tensor], name: str, dimensions: int, path: Path) -> Tensor:
    if name not in tensors or tensors[name].dim() != dimensions:
        raise InputError(
            f"{path}: expected a tensor {name!r} of {dimensions} axes, as in a VQGAN, latent diffusion's, LlamaGen's "
            f"or diffusers' autoencoder; found tensors such as {', '.join(sorted(tensors)[:3])}"
        )
    if not tensors[name].is_floating_point():
        raise InputError(f"{path}: tensor {name!r}: expected float32 or half precision, found {tensors[name].dtype}")
    return tensors[name]
