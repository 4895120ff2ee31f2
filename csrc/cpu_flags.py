"""The compiler's flags for each file of csrc/cpu: GCC's and Clang's."""

import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache

X86 = platform.machine() in ("x86_64", "AMD64")
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"]
_INSTRUCTION_SETS = {
    "kmeans_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "kmeans_avx512vnni": _AVX512,
    "kmeans_amx": [*_AVX512, "-mamx-tile", "-mamx-int8"],
}


def instruction_set(stem: str, compiler: Sequence[str]) -> list[str]:
    """Flags of the instruction set that the file ``stem``.cpp is written for.

    None where this C++ ``compiler``, a command, does not know AMX (before GCC 11, Clang 12): its file is then empty.
    """
    flags = _INSTRUCTION_SETS.get(stem, []) if X86 else []
    return [] if stem == "kmeans_amx" and not _knows((*compiler, *flags)) else flags


@cache
def _knows(command: tuple[str, ...]) -> bool:
    return subprocess.run([*command, "-x", "c++", "-fsyntax-only", os.devnull], capture_output=True).returncode == 0


def macros() -> list[str]:
    """What all files see defined."""
    return ["DIFFPRUNE_X86"] if X86 else []
