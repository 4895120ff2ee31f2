"""Checkpoints: one folder per step, safetensors and JSON, there whole or not at all.

    <run>/step_00000400/model.safetensors       weights and buffers
                        ema.safetensors         moving average of the weights (not for a VQ-VAE)
                        optimizer.safetensors   AdamW's moments, by parameter name
                        discriminator.safetensors, discriminator_optimizer.safetensors   of an adversarial VQ-VAE
                        state.json              what made it: step, config, data, a sha256 of each file above

There is no state of a random generator in it: all of training's randomness is a function of (seed, step).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffprune._version import __version__
from diffprune.config import DitConfig, from_dict
from diffprune.errors import DiskFullError, InputError
from diffprune.files import atomic_dir, check_fields, read_json, sha256_file, write_json
from diffprune.foreign_dits import check_diffusers_config, diffusers_dit_folder, published_names
from diffprune.models.dit import DiT
from diffprune.models.kl import KLAutoencoder, build_autoencoder
from diffprune.models.vqvae import VQVAE
from diffprune.storage import AnyPath, RemotePath, as_path
from diffprune.storage.folders import spool_folder
from diffprune.storage.spool import kept_file, local_file
from diffprune.weight_files import DIFFUSERS_WEIGHTS, check_tensors, in_float32, no_diffusers_weights, read_weights

FORMAT_VERSION = 1
STATE_FILE = "state.json"
_STATE_TYPES = {"kind": str, "step": int, "total_steps": int, "lr": float, "images_seen": int, "seed": int}
_STATE_TYPES.update({"config": dict, "data": dict, "files": dict})
# Of a DiT's config: with another value the same weights fit, and compute something else.
_IN_NO_TENSOR = ("num_heads", "time_scale", "rope")
_STEP = re.compile(r"step_(\d{8,})")

Model = TypeVar("Model", bound=nn.Module)


def load_dit(
    checkpoint: str | os.PathLike, weights: Literal["ema", "model"] = "ema", device: torch.device | str = "cpu"
) -> tuple[DiT, dict[str, Any]]:
    """The DiT of a checkpoint, or of a run folder's last one, and the checkpoint's state.

    A checkpoint that ``convert`` made has one set of weights, whichever is asked for. The state is ``state.json``'s
    content and "sha256" (of the weights' file) and "path" (of the checkpoint).

    Raises:
        InputError: no checkpoint there, one of a VQ-VAE, damaged files, or tensors that do not fit the config.
    """
    if weights not in ("ema", "model"):
        raise InputError(f"weights: expected ema or model, got {weights!r}")
    return _load(checkpoint, "dit", lambda config: DiT(**asdict(config)), weights, device)


def load_vqvae(
    checkpoint: str | os.PathLike, device: torch.device | str = "cpu"
) -> tuple[VQVAE | KLAutoencoder, dict[str, Any]]:
    """The autoencoder of a checkpoint, of a run folder's last one, or of another program, and its state.

    Another program's is loaded by ``foreign_autoencoders.load_foreign_autoencoder``. The state has "sha256" and "path",
    and for a checkpoint what ``load_dit`` gives.
    """
    from diffprune.foreign_autoencoders import is_foreign_autoencoder, load_foreign_autoencoder

    if is_foreign_autoencoder(checkpoint):
        return load_foreign_autoencoder(checkpoint, device)
    model, state = _load(checkpoint, "vqvae", build_autoencoder, "model", device)
    if not model.latent_scale.isfinite():
        raise InputError(
            f"{state['path']}: latent_scale is {float(model.latent_scale)}, expected a finite number: its training "
            "diverged; use a checkpoint from before, or a lower train.lr"
        )
    return model, state


def load_start(path: str | os.PathLike, config: DitConfig, latents: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Weights to begin a DiT's training with, and the sha256 of their file.

    Args:
        path: a checkpoint or run folder (its moving average of weights is taken), or a file or folder as of
            ``load_foreign_dit``. A published DiT's weights predict noise and not velocity: training goes on from
            them, they are no velocity model yet.
        config: the model that they have to fit.
        latents: what identifies the latents to train on; a checkpoint must have been made on the same.

    Raises:
        InputError: nothing readable there, weights of another model than ``config``, or latents of another VQ-VAE or
            scale.
    """
    path = as_path(path)
    foreign = not path.is_dir() and not (path / STATE_FILE).is_file()  # https:// has files, but no folders
    if foreign or diffusers_dit_folder(path) is not None:
        model, sha256 = read_foreign_dit(path, config)
        return model.state_dict(), sha256
    folder = list_checkpoints(path)[-1]
    state = read_state(folder)
    weights = "ema" if "ema.safetensors" in state["files"] else "model"
    model, state = load_dit(folder, weights)
    with torch.device("meta"):
        expected = DiT(**asdict(config)).state_dict()
    check_tensors(model.state_dict(), expected, folder / f"{weights}.safetensors")
    for name in _IN_NO_TENSOR:
        was, wanted = getattr(model.config, name), getattr(config, name)
        if was != wanted:
            raise InputError(
                f"{folder}: model.{name} is {was!r} there, {wanted!r} now: its weights would make another model; "
                f"set model.{name} to {was!r}"
            )
    theirs = state.get("latents") or {}
    for name, ours in latents.items():
        if theirs.get(name) != ours:
            raise InputError(
                f"{folder}: made on latents of another VQ-VAE: {name} {theirs.get(name)!r} there, {ours!r} now"
            )
    return model.state_dict(), state["sha256"]


def load_foreign_dit(path: str | os.PathLike, config: DitConfig, device: torch.device | str = "cpu") -> DiT:
    """A DiT from another program: ``.safetensors``, ``.pt`` with a state dict or one under "ema", or diffusers' folder.

    ``.pt`` files are Python pickles: only tensors and plain containers are accepted (``weights_only=True``), never
    code. Weights in half precision become float32. ``config`` must describe the model; for the published 256×256 ones
    it is ``configs/dit-xl-2-imagenet.toml``.

    A folder is one of diffusers' ``DiTTransformer2DModel`` (``config.json`` and
    ``diffusion_pytorch_model.safetensors``), or of a pipeline that has one under ``transformer``. The model is the
    published one, from which diffusers' differs a little: see ``foreign_dits``.

    Raises:
        InputError: no such file, one that holds anything else, or tensors that do not fit ``config``.
    """
    return read_foreign_dit(path, config)[0].to(device)


def read_foreign_dit(path: str | os.PathLike, config: DitConfig) -> tuple[DiT, str]:
    """The same on the CPU, and the sha256 of the weights' file."""
    path = as_path(path)
    folder = diffusers_dit_folder(path)
    if folder is not None:
        check_diffusers_config(folder / "config.json", config)
        path = folder / DIFFUSERS_WEIGHTS
        if not path.is_file():
            raise no_diffusers_weights(path)
    try:
        with local_file(path) as file:
            tensors, sha256 = in_float32(read_weights(file, under=("ema",), name=path), path), sha256_file(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    if folder is not None:
        tensors = published_names(tensors, config, path)
    return filled(lambda: DiT(**asdict(config)), tensors, path), sha256


def list_checkpoints(path: str | os.PathLike) -> list[AnyPath]:
    """The checkpoints of a run folder by step, or the one that ``path`` is; InputError if there is none."""
    path = as_path(path)
    if (path / STATE_FILE).is_file():
        return [path]
    found = find_checkpoints(path)
    if not found:
        what = "no checkpoint in this folder" if path.is_dir() else "no such folder, or none that can be listed"
        raise InputError(f"{path}: {what}; expected a run folder of `diffprune train` or one of its step_* folders")
    return found


def find_checkpoints(run_folder: str | os.PathLike) -> list[AnyPath]:
    """The checkpoints of a run folder by step; none if there are none."""
    folder = as_path(run_folder)
    entries = folder.iterdir() if folder.is_dir() else ()
    names = [entry.name for entry in entries if isinstance(entry, RemotePath) or entry.is_dir()]
    steps = sorted((int(match[1]), name) for name in names if (match := _STEP.fullmatch(name)))
    found = [folder / name for _, name in steps]
    if isinstance(folder, RemotePath):  # those that came there whole
        from diffprune.storage.clients import in_threads

        whole = in_threads(RemotePath.is_file, [path / STATE_FILE for path in found])
        found = [path for path, there in zip(found, whole, strict=True) if there]
    return found


def save_checkpoint(
    run_folder: AnyPath, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> AnyPath:
    """Write ``<run_folder>/step_<state["step"]>`` atomically and return it; of a URL ``state.json`` comes last.

    Args:
        state: kind, step, total_steps, lr, images_seen, seed, config, data, latents.
        tensors: file name without suffix ("model", ...) -> tensor name -> tensor.

    Raises: DiskFullError where it could not be written; nothing of it is left then.
    """
    folder = checkpoint_path(run_folder, state["step"])
    try:
        with atomic_dir(folder, last=STATE_FILE) as temporary:
            files = {}
            for name, values in tensors.items():
                path = temporary / f"{name}.safetensors"
                save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, path)
                files[path.name] = sha256_file(path)
            head = {"format_version": FORMAT_VERSION, "version": __version__, "files": files}
            write_json(temporary / STATE_FILE, {**state, **head})
    except (OSError, SafetensorError) as error:  # safetensors has no error of its own for a write that failed
        if isinstance(folder, RemotePath) and getattr(error, "errno", errno.ENOSPC) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = sum(value.nbytes for values in tensors.values() for value in values.values())
        free = shutil.disk_usage(run_folder if isinstance(run_folder, Path) else spool_folder()).free
        raise DiskFullError(
            f"{folder}: could not be written ({error}); it takes {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB "
            "are free; checkpoints before it stand: make room and run the same command again"
        ) from error
    return folder


def checkpoint_path(run_folder: AnyPath, step: int) -> AnyPath:
    """Where ``save_checkpoint`` puts a step."""
    return run_folder / f"step_{step:08d}"


def keep_weights(checkpoint: AnyPath, weights: str) -> None:
    """Leave of a checkpoint what it is loaded for with these ``weights``; training can't go on from it any more."""
    state = read_state(checkpoint)
    file = f"{weights}.safetensors"
    write_json(checkpoint / STATE_FILE, {**state, "files": {file: state["files"][file]}})
    for other in state["files"].keys() - {file}:
        (checkpoint / other).unlink(missing_ok=True)


def read_state(checkpoint: AnyPath) -> dict[str, Any]:
    """``state.json`` of a checkpoint folder, its fields' presence and types checked; InputError otherwise."""
    path = checkpoint / STATE_FILE
    state = read_json(path)
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        found = state.get("format_version") if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path}: expected a checkpoint of format_version {FORMAT_VERSION}, found {found!r}")
    check_fields(path, state, _STATE_TYPES)
    return state


def read_tensors(checkpoint: AnyPath, state: Mapping[str, Any], name: str, *, again: bool = False) -> dict[str, Tensor]:
    """The tensors of ``<name>.safetensors`` on the CPU; InputError if it is missing or not the file that was saved.

    ``again``: it may be read again by this process, so that a local copy of a URL's is worth keeping.
    """
    path = checkpoint / f"{name}.safetensors"
    expected = state["files"].get(path.name)
    if expected is None:
        remedy = {
            "ema": '; a run with train.ema_decay 0 has none: take weights "model"',
            "optimizer": "; training cannot go on from it: begin another run with --start-from it",
        }.get(name, "")
        raise InputError(f"{checkpoint}: has no {path.name}; it has {', '.join(sorted(state['files']))}{remedy}")
    try:
        with (kept_file if again else local_file)(path) as file:
            if (found := sha256_file(file)) != expected:
                raise InputError(f"{path}: damaged: expected sha256 {expected}, found {found}; use another checkpoint")
            return load_file(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, although {STATE_FILE} lists it; use another checkpoint") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def _load(
    checkpoint: str | os.PathLike, kind: str, build: Callable[[Any], Model], weights: str, device: torch.device | str
) -> tuple[Model, dict[str, Any]]:
    folder = list_checkpoints(checkpoint)[-1]
    state = read_state(folder)
    if state["kind"] != kind:
        raise InputError(f"{folder}: expected a checkpoint of a {kind}, found one of a {state['kind']}")
    run = from_dict(kind, state["config"], str(folder / STATE_FILE))
    if "predicts" in state:  # made by `convert`
        weights = "model"
    tensors = read_tensors(folder, state, weights, again=True)
    file = f"{weights}.safetensors"
    model = filled(lambda: build(run.model), tensors, folder / file)
    return model.to(device).eval(), {**state, "sha256": state["files"][file], "path": str(folder)}


def filled(build: Callable[[], Model], tensors: dict[str, Tensor], path: AnyPath) -> Model:
    """The model that ``build`` makes, with these tensors, in eval mode; InputError if they don't fit it."""
    with torch.device("meta"):  # no memory and no time spent on initial weights
        model = build()
    check_tensors(tensors, model.state_dict(), path)
    model.load_state_dict(tensors, assign=True)
    return model.eval()
