"""Which bounds of the CUDA kernels could go without a test noticing; as mutate_masks.py, in the emulator.

    python tests/soak/mutate_csrc.py                    every kernel of csrc
    python tests/soak/mutate_csrc.py kmeans_update.cu --list

One change at a time, each compiled: a comparison with a size goes or lets one more through, a ``min`` goes, an early
return goes. Takes hours on one core.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mutate_masks import ROOT, Mutant, command_line

CSRC = Path("csrc")
FLOW = "test_cuda_flow_matching_loss"
DOT, SQNORM, ASSIGN = "test_cuda_linear_grad_dot", "test_cuda_linear_grad_sqnorm", "test_cuda_kmeans_assign"
TESTS = {
    "flow_matching_loss.cu": (FLOW,),
    "fours.cuh": (FLOW, ASSIGN),
    "gemm_sm80.cuh": (DOT, SQNORM),
    "kmeans_assign.cu": (ASSIGN,),
    "kmeans_assign_again.cu": (ASSIGN,),
    "kmeans_assign_sm90.cu": (ASSIGN,),
    "kmeans_search.cuh": (ASSIGN,),
    "kmeans_update.cu": ("test_cuda_kmeans_update",),
    "linear_grad_dot.cu": (DOT,),
    "linear_grad_dot_sm90.cu": (DOT,),
    "linear_grad_sqnorm.cu": (SQNORM,),
    "linear_grad_sqnorm_sm90.cu": (SQNORM,),
}

NAMES = "n k d dimensions padded count columns rows tiles items end wide high tokens clusters row_tiles strips elements"
CONSTANTS = "kTogether|kFewColumns|Cluster"
SIZE = rf"(?:shape\.\w+|matrix\.\w+|[xw]\.rows|{'|'.join(NAMES.split())}|steps|ceil_div\([^()]*\)|{CONSTANTS})"
VALUE = r"(?:int\([\w.]+\)|int64_t\([\w.]+\)|[\w.]+(?:\[[\w.]+\])?)(?: [+*] (?:\w+|int\([\w.]+\)))*"
COMPARISON = re.compile(rf"(?<![\w.\])] )({VALUE}) (<|>=) ({SIZE})\b(?![(\[])")
MINIMUM = re.compile(r"\bmin\(([\w.]+), ([^()]+)\)")
LEAVES = re.compile(r"if \(([^;{}]*)\) (return|continue);")

UNNOTICEABLE = {
    "a tile more is loaded, as zeros, and nobody reads it": (
        ("gemm_sm80.cuh", "step < steps -> step <= steps"),
        ("gemm_sm80.cuh", "step < steps -> true"),
        ("kmeans_assign_again.cu", "column < shape.k -> column <= shape.k"),
        ("kmeans_assign_sm90.cu", "column < shape.k -> column <= shape.k"),
        ("linear_grad_sqnorm_sm90.cu", "item < items -> item <= items"),
    ),
    "work saved: what is found of rows that are not on the list nobody reads": (
        ("kmeans_assign_again.cu", "entry < count -> entry <= count"),
        ("kmeans_assign_again.cu", "entry < count -> true"),
    ),
    "work saved: the last rows, or all samples, are summed again to the same": (
        ("kmeans_assign_again.cu", "start < count -> start <= count"),
        ("linear_grad_sqnorm.cu", "if (entry >= samples.count()) return; -> ;"),
    ),
    "for what a GPU may make of NaN: here such a row has column 0": (
        ("kmeans_assign.cu", "min(candidate.x, k - 1) -> candidate.x"),
        ("kmeans_assign.cu", "min(candidate.y, k - 1) -> candidate.y"),
    ),
    "a warp without a column holds infinity, which wins nothing": (
        ("kmeans_assign_again.cu", "columns[i] < k -> columns[i] <= k"),
        ("kmeans_assign_again.cu", "columns[i] < k -> true"),
    ),
}
"""Why no test here can notice a change -> (file, "before -> after")."""


def mutants(name: str) -> list[Mutant]:
    """All changes of one file's kernels, from top to bottom."""
    source = (ROOT / CSRC / name).read_bytes()
    text, found = source.decode(), []

    def add(match: re.Match[str], kind: str, after: str) -> None:
        start, end = (len(text[:place].encode()) for place in match.span())
        line = text.count("\n", 0, match.start()) + 1
        found.append(Mutant(CSRC / name, line, kind, match[0], after, start, end, TESTS[name]))

    for match in COMPARISON.finditer(text):
        head = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if "//" in head or head.startswith("#") or "static_assert" in head:
            continue
        loop = "for (" in head and head.rindex("for (") > head.rfind(")")
        if not loop:
            add(match, "no bound", "true" if match[2] == "<" else "false")
        add(match, "one more", f"{match[1]} {'<=' if match[2] == '<' else '>'} {match[3]}")
    for match in MINIMUM.finditer(text):
        add(match, "no minimum", match[1])
    for match in LEAVES.finditer(text):
        add(match, "goes on", ";")
    return sorted(found, key=lambda mutant: (mutant.start, mutant.after))


def main() -> int:
    """See the module."""
    return command_line(__doc__, "files", TESTS, mutants, UNNOTICEABLE)


if __name__ == "__main__":
    sys.exit(main())
