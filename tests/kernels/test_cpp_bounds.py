"""The C++ forms touch no memory but that of their arguments: compiled with GCC's or Clang's sanitizers, and run."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc"))
import cpu_flags

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitized"
SOURCES = ROOT / "csrc" / "cpu"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiled(source: Path) -> Path:
    """The object of a source; kept until a source or a header changes."""
    flags = ["-std=c++17", "-O1", "-g1", "-w", "-pthread", *SANITIZERS]
    flags += [*(f"-D{name}" for name in cpu_flags.macros()), *cpu_flags.instruction_set(source.stem, ["c++"])]
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
