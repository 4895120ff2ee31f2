"""The C++ forms touch no memory but that of their arguments: compiled with GCC's or Clang's sanitizers, and run."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitized"
SOURCES = ROOT / "csrc" / "cpu"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
INSTRUCTION_SETS = {
    "kmeans_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "kmeans_avx512vnni": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
}
"""As in setup.py."""


def compiled(source: Path) -> Path:
    """The object of a source; kept until a source or a header changes."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = ["-std=c++17", "-O1", "-g1", "-w", "-pthread", *SANITIZERS, *["-DDIFFPRUNE_X86"] * x86]
    flags += INSTRUCTION_SETS.get(source.stem, []) if x86 else []
    texts = [path.read_text() for path in (source, *sorted(SOURCES.glob("*.[hi]*")))]
    digest = hashlib.sha256("\0".join([*flags, *texts]).encode()).hexdigest()[:16]
    target = FOLDER / f"{source.stem}-{digest}.o"
    if not target.exists():
        for old in FOLDER.glob(f"{source.stem}-*.o"):
            old.unlink(missing_ok=True)
        half = target.with_name(f"half-{os.getpid()}-{target.name}")  # a run that is stopped leaves no broken object
        run(["c++", *flags, "-c", str(source), "-o", str(half)])
        half.replace(target)
    return target


def run(command: list[str], links: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if links and any(missing in done.stderr for missing in ("-lasan", "libclang_rt", "cannot find -l")):
        pytest.skip("the compiler has no sanitizers here")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_no_memory_but_that_of_the_arguments() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    FOLDER.mkdir(parents=True, exist_ok=True)
    sources = [path for path in SOURCES.glob("*.cpp") if path.stem != "bindings"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sorted(sources), Path(__file__).with_name("cpp_bounds.cpp")]))
    program = FOLDER / "bounds"
    run(["c++", *SANITIZERS, "-pthread", *map(str, objects), "-o", str(program)], links=True)
    assert run([str(program)]) == "done\n"
