"""CLIP, OpenCLIP, SigLIP, DINOv2 and DINOv3 image towers, from a folder or from the Hugging Face hub.

The network is asked only for a hub id. Weights are read from safetensors only, and no code that comes with a model is
run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffprune.errors import InputError
from diffprune.files import read_json, sha256_file
from diffprune.models.embedders import Embedder, network_embedder
from diffprune.models.openclip import CONFIG_FILE as OPENCLIP_CONFIG
from diffprune.models.openclip import WEIGHTS_FILE as OPENCLIP_WEIGHTS
from diffprune.models.openclip import load_openclip
from diffprune.models.preprocessing import read_transformers_preprocessing

# model_type in config.json -> the class of the image tower, and which of its outputs is the embedding
_TOWERS = {
    "clip": ("CLIPVisionModelWithProjection", "image_embeds"),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "image_embeds"),
    "siglip": ("SiglipVisionModel", "pooler_output"),
    "siglip_vision_model": ("SiglipVisionModel", "pooler_output"),
    "dinov2": ("Dinov2Model", "pooler_output"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "pooler_output"),
    "dinov3_vit": ("DINOv3ViTModel", "pooler_output"),
    "dinov3_convnext": ("DINOv3ConvNextModel", "pooler_output"),
}
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_SETTINGS = ["config.json", "preprocessor_config.json", "processor_config.json", OPENCLIP_CONFIG]
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_TO_DOWNLOAD = f"config.json, preprocessor_config.json and {_WEIGHTS} (or {OPENCLIP_CONFIG} and {OPENCLIP_WEIGHTS})"


def load_pretrained(model: str, device: torch.device, precision: str) -> Embedder:
    """The image tower in a local folder, or of a hub id such as openai/clip-vit-large-patch14 or ID@REVISION.

    Embeddings are CLIP's projected ``image_embeds``, SigLIP's ``pooler_output`` and the normalised class token of
    DINOv2 and DINOv3. Raises InputError as ``load_embedder``.
    """
    folder = _find(model)
    if not (folder / "config.json").is_file() and (folder / OPENCLIP_CONFIG).is_file():
        tower, preprocessing = load_openclip(folder)
        head = {"model": "open_clip", "model_sha256": sha256_file(folder / OPENCLIP_WEIGHTS), "output": "image_embeds"}
        return network_embedder(tower.to(device), preprocessing, head, model, device, precision)
    kind, tower, output = _load_tower(folder)
    preprocessing = read_transformers_preprocessing(folder)
    size = getattr(tower.config, "image_size", None)
    if kind.startswith(("clip", "siglip")) and preprocessing.size != (size, size):  # the DINOs take other sizes too
        raise InputError(
            f"{folder}: config.json says images of {size}×{size}, preprocessor_config.json makes them "
            f"{preprocessing.size[0]}×{preprocessing.size[1]}; are they of two models?"
        )
    tower.to(device)

    def network(images: Tensor) -> Tensor:
        return getattr(tower(pixel_values=images), output)

    head = {"model": kind, "model_sha256": _weights_sha256(folder), "output": output}
    return network_embedder(network, preprocessing, head, model, device, precision)


def _find(model: str) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{model}: expected a model's folder, found a file; give the folder with {_TO_DOWNLOAD}")
    match = _HUB_ID.fullmatch(model)
    if match is None:
        raise InputError(
            f"model {model!r}: expected a folder (there is none of that name), a hub id such as "
            f"openai/clip-vit-large-patch14, efficientnet-lite0, vqvae:PATH, or package.module:function"
        )
    return _download(model, match["repo"], match["revision"])


def _download(model: str, repo: str, revision: str | None) -> Path:
    """The hub's files in its local cache; files that are there already are not fetched again."""
    hub = _import("huggingface_hub", model)
    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=_SETTINGS))
        if (folder / "config.json").is_file() or not (folder / OPENCLIP_CONFIG).is_file():
            weights = [_WEIGHTS, _WEIGHTS_INDEX, "model-*.safetensors"]
        else:
            weights = [OPENCLIP_WEIGHTS]
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[*_SETTINGS, *weights]))
    except (hub.errors.HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"model {model!r}: there is no folder of that name, and it cannot be had from the hub "
            f"({type(error).__name__}: {reason}). Where there is a network, download {_TO_DOWNLOAD} of {repo} into a "
            f"folder, and give that folder as the model"
        ) from error


def _load_tower(folder: Path) -> tuple[str, nn.Module, str]:
    """(model_type, the tower on the CPU in float32, the name of its output)."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _TOWERS:
        found = f"a model of type {kind!r}" if kind else "no config.json with a model_type"
        raise InputError(
            f"{folder}: expected a model of type {', '.join(_TOWERS)}, found {found}; a model's folder has "
            f"{_TO_DOWNLOAD}"
        )
    _weight_files(folder)
    class_name, output = _TOWERS[kind]
    transformers = _import("transformers", str(folder))
    tower_class = getattr(transformers, class_name, None)
    if tower_class is None:
        raise InputError(
            f"{folder}: transformers {transformers.__version__} has no {class_name}; pip install -U transformers"
        )
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    try:
        with _silence(transformers.logging):  # that the text tower is left out is no news
            tower, info = tower_class.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: cannot be loaded as a {class_name} ({error}); download it again") from error
    if info["missing_keys"]:
        raise InputError(
            f"{folder}: its weights lack {len(info['missing_keys'])} tensors of a {class_name}, "
            f"{min(info['missing_keys'])!r} first; download {_WEIGHTS} again"
        )
    return kind, tower.eval(), output


@contextmanager
def _silence(logging: Any) -> Iterator[None]:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a transformers model, all there."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _WEIGHTS_INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise InputError(
            f"{folder}: the weights are missing: expected {_WEIGHTS}; download it from where config.json came from, "
            f"into this folder" + (f" ({pickles[0]} is a pickle, and is not read)" if pickles else "")
        )
    index = read_json(folder / _WEIGHTS_INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    names = sorted(set(names.values())) if isinstance(names, dict) else []
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise InputError(f"{folder / _WEIGHTS_INDEX}: expected a weight_map of file names in this folder")
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file, although {_WEIGHTS_INDEX} lists it; download it")
    return [folder / name for name in names]


def _weights_sha256(folder: Path) -> str:
    """Of the one file, or of the names and hashes of several."""
    digests = {path.name: sha256_file(path) for path in _weight_files(folder)}
    if digests.keys() == {_WEIGHTS}:
        return digests[_WEIGHTS]
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()


def _import(package: str, model: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise InputError(
            f"model {model!r}: needs {package}, which cannot be imported ({error}); pip install 'diffprune[embed]'"
        ) from error
