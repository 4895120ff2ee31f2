"""``doctor``: what this machine has, and which implementation of each op can run here, or why not."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from diffprune._version import __version__
from diffprune.kernels import report
from diffprune.kernels.dispatch import UNCONFIRMED, orders, unconfirmed

PACKAGES = ("torch", "numpy", "pyarrow", "safetensors", "simplejpeg", "pillow", "triton", "cupy", "faiss", "webdataset")


def doctor() -> dict[str, Any]:
    """Versions, devices, and per op each implementation: "runs", "runs when asked for by name", or the reason why not.

    In the order in which they are tried; where that is not the usual one, ``orders`` says why. An implementation that
    no GPU has confirmed yet is in ``unconfirmed``: it is not chosen by itself, and its entries say so, but where
    ``DIFFPRUNE_CONFIRMED`` says that the one here has.
    """
    return {
        "diffprune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device(),
        "threads": torch.get_num_threads(),
        "unconfirmed": sorted(UNCONFIRMED),
        "orders": {op: f"{', '.join(names)}: {because}" for op, (names, because) in orders().items()},
        "ops": {op: {name: _say(op, name, why) for name, why in found.items()} for op, found in report().items()},
    }


def _say(op: str, name: str, reason: str | None) -> str:
    if name in unconfirmed(op):
        return f"{reason or 'runs when asked for by name'}; no GPU has confirmed it yet"
    return reason or "runs"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        try:
            return getattr(import_module(name), "__version__", "installed")
        except ImportError:
            return None


def _device() -> str:
    if not torch.cuda.is_available():
        return f"cpu: {platform.processor() or platform.machine()}, no CUDA device"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
    )
