"""The vision transformer of OpenCLIP checkpoints (Radford et al. 2021, arXiv 2103.00020; Cherti et al., 2212.07143).

A folder in OpenCLIP's format has ``open_clip_config.json`` and ``open_clip_model.safetensors``. Modules carry the
checkpoint's own names, so that its tensors load as they are; the text tower is left on disk.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from diffprune.checkpoints import check_tensors
from diffprune.errors import InputError
from diffprune.files import read_json
from diffprune.models.preprocessing import RESAMPLING, Preprocessing

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
# Fields of vision_cfg: those that change nothing at inference, those with one value that this tower can have, and
# those that set its shape, with their defaults.
_IGNORED = {"patch_dropout", "output_tokens", "timm_model_pretrained"}
_ONLY = {"pool_type": "tok", "pos_embed_type": "learnable"}
_FIELDS = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0}
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """The shape of a tower; ``embed_dim`` is that of its output."""

    embed_dim: int
    image_size: int
    patch_size: int
    width: int
    layers: int
    head_width: int
    mlp_ratio: float
    quick_gelu: bool


class VisionTower(nn.Module):
    """float32 images [B, 3, S, S], normalised -> image embeddings [B, embed_dim], not normalised."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, grid = config.width, config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(grid * grid + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).mT  # [B, patches, width], row by row
        tokens = torch.cat([self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1), patches], dim=1)
        tokens = self.transformer.resblocks(self.ln_pre(tokens + self.positional_embedding))
        return self.ln_post(tokens[:, 0]) @ self.proj


class Block(nn.Module):
    """Self-attention and MLP, each after a LayerNorm and beside the identity."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, config.head_width)
        self.ln_2 = nn.LayerNorm(width)
        activation = QuickGELU() if config.quick_gelu else nn.GELU()
        layers = {"c_fc": nn.Linear(width, hidden), "gelu": activation, "c_proj": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """``nn.MultiheadAttention``'s parameters, one input."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)  # each [B, heads, tokens, head]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    """x σ(1.702 x), what OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def load_openclip(folder: Path) -> tuple[VisionTower, Preprocessing]:
    """The image tower of a folder in OpenCLIP's format, on the CPU, in float32, and how it wants its images.

    Raises InputError if a file is missing or damaged, or if the config asks for what this tower has not: a timm or
    ResNet tower, attentional pooling, layer scale.
    """
    config, preprocessing = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; download it from where {CONFIG_FILE} came from, into this folder "
            f"(open_clip_pytorch_model.bin is a pickle, and is not read)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in list(file.keys()) if name.startswith("visual.")]
            tensors = {name.removeprefix("visual."): file.get_tensor(name).float() for name in names}
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    with torch.device("meta"):
        tower = VisionTower(config)
    check_tensors(tensors, tower.state_dict(), path)
    tower.load_state_dict(tensors, assign=True)
    return tower.eval(), preprocessing


def _read_config(path: Path) -> tuple[VisionConfig, Preprocessing]:
    found = read_json(path)
    model = found.get("model_cfg") if isinstance(found, dict) else None
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(vision, dict) or type(model.get("embed_dim")) is not int:
        raise InputError(f"{path}: expected model_cfg with embed_dim and vision_cfg, found something else")
    unknown = {
        name: value
        for name, value in vision.items()
        if name not in _FIELDS and name not in _IGNORED and value not in (None, False, _ONLY.get(name))
    }
    if unknown:
        shown = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise InputError(
            f"{path}: vision_cfg: {shown} is not supported; use the model in transformers' format, if there is one"
        )
    values = {name: vision.get(name, default) for name, default in _FIELDS.items()}
    wrong = {name: value for name, value in values.items() if not _fits(value, _FIELDS[name])}
    if wrong or values["width"] % values["head_width"] or values["image_size"] < values["patch_size"]:
        shown = wrong or values
        raise InputError(f"{path}: vision_cfg: expected the numbers of a square vision transformer, found {shown}")
    config = VisionConfig(model["embed_dim"], quick_gelu=bool(model.get("quick_gelu", False)), **values)
    return config, _preprocessing(found.get("preprocess_cfg") or {}, config.image_size, path)


def _fits(value: Any, default: int | float) -> bool:
    return type(value) in (int, type(default)) and value > 0


def _preprocessing(found: dict[str, Any], image_size: int, path: Path) -> Preprocessing:
    mode, resample = found.get("resize_mode") or "shortest", found.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash") or resample not in RESAMPLING:
        raise InputError(
            f"{path}: preprocess_cfg: expected resize_mode shortest or squash and interpolation bicubic or bilinear, "
            f"found {mode!r} and {resample!r}"
        )
    square = (image_size, image_size)
    mean, std = tuple(found.get("mean") or _OPENAI_MEAN), tuple(found.get("std") or _OPENAI_STD)
    if len(mean) != 3 or len(std) != 3 or not all(isinstance(value, (int, float)) for value in mean + std):
        raise InputError(f"{path}: preprocess_cfg: expected mean and std of 3 channels, found {mean} and {std}")
    if mode == "squash":
        return Preprocessing(square, None, mean, std, resample)
    return Preprocessing(image_size, square, mean, std, resample, crop_rounding="even")
