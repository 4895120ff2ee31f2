"""Builds the CUDA extension ``diffprune/_C``: ``python csrc/cuda_build.py``, or ``pip install`` through setup.py.

Environment:
    DIFFPRUNE_CUDA: ``auto`` (default) builds where nvcc is, ``1`` makes its absence an error, ``0`` skips.
    DIFFPRUNE_CUDA_ARCHS: default ``80;90a;100``. The kernels of files named ``*_sm90.cu`` need 90a; the other files
        are compiled for each of them, and carry PTX of the lowest for newer devices.
    CUDA_HOME: where nvcc is, if not on the PATH.

Needs nvcc 12.5 or newer, a C++ compiler and pybind11's headers (those in PyTorch do); no PyTorch, no GPU. What did not
change is not compiled again; objects and ptxas's reports are kept in ``build/csrc``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
OBJECTS = ROOT / "build" / "csrc"
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


class BuildError(Exception):
    """The extension was asked for and cannot be built; the message is for the user."""


def wanted() -> bool:
    """Whether to build here. Raises BuildError for a bad setting, and if nvcc is required and missing."""
    setting = os.environ.get("DIFFPRUNE_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise BuildError(f"expected DIFFPRUNE_CUDA to be auto, 0 or 1, got {setting!r}")
    if setting == "1" and find_nvcc() is None:
        raise BuildError("DIFFPRUNE_CUDA=1, but there is no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda")
    return setting != "0" and find_nvcc() is not None


def find_nvcc() -> str | None:
    """CUDA's compiler, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates = [Path(home, "bin", "nvcc") for home in (*homes, "/usr/local/cuda")]
    first = next((str(path) for path in candidates[: len(homes)] if path.exists()), None)
    return first or shutil.which("nvcc") or next((str(path) for path in candidates if path.exists()), None)


def architectures() -> list[str]:
    """What to compile for, without "sm_"."""
    setting = os.environ.get("DIFFPRUNE_CUDA_ARCHS", "80;90a;100")
    names = [name.strip().removeprefix("sm_") for name in setting.split(";")]
    if not all(name.rstrip("af").isdigit() for name in names):
        raise BuildError(f"expected DIFFPRUNE_CUDA_ARCHS like 80;90a;100, got {setting!r}")
    return sorted(names, key=lambda name: int(name.rstrip("af")))


def build(target: Path, jobs: int | None = None) -> Path:
    """Compile what changed and link ``target``; returns it. Raises BuildError with the compiler's message."""
    objects = compile_objects(jobs)
    command = [str(find_nvcc()), "-shared", "-cudart", "static", *map(str, objects)]
    key = _digest(*(path.with_suffix(".key").read_text() for path in objects), *command)
    stamp = OBJECTS / f"{target.name}.{_digest(str(target))[:8]}.link"
    if target.exists() and stamp.exists() and stamp.read_text() == key:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    run([*command, "-o", str(unfinished)])
    os.replace(unfinished, target)  # a running process may have the old one mapped
    stamp.write_text(key)
    return target


def compile_objects(jobs: int | None = None) -> list[Path]:
    """The objects of all sources, compiled where they are out of date."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    names = architectures()
    sources = [path for path in sorted(SOURCES.glob("*.c*")) if path.suffix in (".cu", ".cpp")]
    sources = [path for path in sources if "90a" in names or not path.stem.endswith("_sm90")]
    with ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda source: _compile(source, names), sources))


def _compile(source: Path, names: list[str]) -> Path:
    target = OBJECTS / (source.name + ".o")
    command = [str(find_nvcc()), "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c", str(source)]
    command += [f'-DDIFFPRUNE_ARCHITECTURES="{";".join(names)}"', *(["-DDIFFPRUNE_SM90"] if "90a" in names else [])]
    if source.suffix == ".cpp":
        command += [f"-I{folder}" for folder in (sysconfig.get_path("include"), pybind11_headers())]
    else:
        own = ["90a"] if source.stem.endswith("_sm90") else names
        command += ["-Xptxas", "-v", *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in own)]
        if own[0].isdigit():
            command.append(f"-gencode=arch=compute_{own[0]},code=compute_{own[0]}")
    texts = [path.read_text() for path in (source, *sorted(SOURCES.glob("*.cuh")), *sorted(SOURCES.glob("*.h")))]
    key = _digest(_nvcc_version(), *command, *texts)
    stamp, log = target.with_suffix(".key"), target.with_suffix(".log")
    if not (target.exists() and log.exists() and stamp.exists() and stamp.read_text() == key):
        stamp.unlink(missing_ok=True)
        log.write_text(run([*command, "-o", str(target)]))
        stamp.write_text(key)
    return target


def pybind11_headers() -> str:
    """Folder of pybind11's headers; raises BuildError if there are none."""
    if find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    spec = find_spec("torch")
    if spec and spec.origin and Path(spec.origin).with_name("include").joinpath("pybind11").exists():
        return str(Path(spec.origin).with_name("include"))
    raise BuildError("nvcc is here, but not pybind11's headers: pip install pybind11, or skip with DIFFPRUNE_CUDA=0")


def _nvcc_version() -> str:
    return subprocess.run([str(find_nvcc()), "--version"], capture_output=True, text=True, check=True).stdout


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def run(command: list[str]) -> str:
    """What the command prints; raises BuildError with it if the command fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\nfailed with exit code {result.returncode}:\n{output}")
    return output


if __name__ == "__main__":
    try:
        if wanted():
            print(build(ROOT / "diffprune" / MODULE))
        else:
            print("no extension: DIFFPRUNE_CUDA=0, or no nvcc here", file=sys.stderr)
    except BuildError as error:
        sys.exit(str(error))
