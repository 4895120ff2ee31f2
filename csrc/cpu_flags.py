"""The compiler's flags for each file of csrc/cpu: GCC's and Clang's."""

import platform

X86 = platform.machine() in ("x86_64", "AMD64")
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"]
_INSTRUCTION_SETS = {
    "kmeans_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "kmeans_avx512vnni": _AVX512,
    "kmeans_amx": [*_AVX512, "-mamx-tile", "-mamx-int8"],
}
MAY_LACK = {"kmeans_amx"}
"""Files that offer nothing where the compiler does not know their flags (before GCC 11 and Clang 12)."""


def instruction_set(stem: str) -> list[str]:
    """Flags of the instruction set that the file ``stem``.cpp is written for."""
    return _INSTRUCTION_SETS.get(stem, []) if X86 else []


def macros() -> list[str]:
    """What all files see defined."""
    return ["DIFFPRUNE_X86"] if X86 else []
