"""The CUDA sources, compiled for the CPU: see emulator.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "emulator"
sys.path.insert(0, str(ROOT / "csrc"))

import cuda_build  # noqa: E402


def unavailable() -> str | None:
    """Why the emulator cannot be compiled here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    return None if _cuda_headers() else "needs CUDA's headers (cuda_fp16.h), from nvcc's folder or the package triton"


@cache
def load() -> ModuleType:
    """The emulated extension: the functions of ``diffprune._C``, for pointers to CPU memory."""
    library = _build()
    loader = ExtensionFileLoader("emulator._C", str(library))
    module = module_from_spec(spec_from_loader("emulator._C", loader))
    loader.exec_module(module)
    return module


def seed(number: int, stragglers: bool = False) -> None:
    """Another order of threads and copies; ``stragglers``: some threads far behind the others, which takes longer."""
    load()
    ctypes.CDLL(str(_build())).emulator_seed(number, int(stragglers))


@cache
def _build() -> Path:
    """The library; what did not change is not compiled again."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    sources = [
        *sorted(cuda_build.SOURCES.glob("*.cu")),
        cuda_build.SOURCES / "bindings.cpp",
        *sorted(HERE.glob("*.cpp")),
    ]
    headers = [*cuda_build.SOURCES.glob("*.h"), *cuda_build.SOURCES.glob("*.cuh"), HERE / "emulator.h"]
    common = [path.read_text() for path in sorted(headers)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, common), sources))
    library = FOLDER / f"{_digest(*(path.name for path in objects))}-{cuda_build.MODULE}"
    return _once(library, ["g++", "-shared", *map(str, objects)])


def _compile(source: Path, common: list[str]) -> Path:
    folders = [cuda_build.SOURCES, HERE, _cuda_headers(), sysconfig.get_path("include"), cuda_build.pybind11_headers()]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-DDIFFPRUNE_EMULATED"]
    flags += ["-fnon-call-exceptions", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    flags += ["-DDIFFPRUNE_SM90", '-DDIFFPRUNE_ARCHITECTURES="emulated"', *(f"-I{folder}" for folder in folders)]
    target = FOLDER / f"{_digest(*flags, *common, source.read_text())}-{source.name}.o"
    return _once(target, ["g++", "-x", "c++", *flags, "-c", str(source)])


def _once(target: Path, command: list[str]) -> Path:
    """Runs the command that makes ``target``, unless it is there; removes older ones."""
    if not target.exists():
        for old in FOLDER.glob(f"*-{target.name.split('-', 1)[1]}"):
            old.unlink()
        unfinished = target.with_suffix(f".{os.getpid()}")
        cuda_build.run([*command, "-o", str(unfinished)])
        unfinished.replace(target)
    return target


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _cuda_headers() -> str | None:
    nvcc = cuda_build.find_nvcc()
    folders = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders += [Path("/usr/local/cuda/include")]
    triton = find_spec("triton")
    folders += [Path(triton.origin).parent / "backends" / "nvidia" / "include"] if triton and triton.origin else []
    return next((str(folder) for folder in folders if (folder / "cuda_fp16.h").exists()), None)
