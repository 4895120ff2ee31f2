"""Which masks of the Triton kernels could go without a test noticing.

    python tests/soak/mutate_masks.py                      every module of diffprune/kernels/triton
    python tests/soak/mutate_masks.py attention --list     what would be changed

One change at a time, in a copy of the package: a mask of a load or store goes, one side of an ``&`` goes, the condition
of a ``tl.where`` is always true or always false, ``<`` before a size becomes ``<=``, a ``tl.minimum`` keeps one side, a
launcher's guard goes. Then the tests of that kernel run in Triton's interpreter, to the first failure. What no test
notices is printed, unless UNNOTICEABLE says why it can not be noticed; exits 1 if there is such. Takes about an hour.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("diffprune/kernels/triton")

LINEAR = ("test_triton_linear_grad", "test_linear_grad_sqnorm_dot")
KMEANS = ("test_triton_kmeans", "test_triton_kmeans_int8")
TESTS = {
    "adaln_modulate": ("test_adaln_modulate",),
    "adaln_modulate_backward": ("test_adaln_modulate",),
    "attention": ("test_attention",),
    "attention_backward": ("test_attention",),
    "flow_interpolate": ("test_flow_interpolate",),
    "flow_matching_loss": ("test_flow_matching_loss",),
    "flow_matching_loss_grad": ("test_flow_matching_loss",),
    "gated_residual": ("test_gated_residual",),
    "gated_residual_adaln": ("test_gated_residual_adaln",),
    "gated_residual_adaln_backward": ("test_gated_residual_adaln",),
    "gated_residual_backward": ("test_gated_residual",),
    "kmeans_assign": KMEANS,
    "kmeans_update": KMEANS[:1],
    "kmeans_update_delta": ("test_kmeans_update_delta",),
    "linear_grad_dot": LINEAR[:1],
    "linear_grad_sqnorm": LINEAR,
    "linear_grad_sqnorm_direct": LINEAR,
    "linear_grad_sqnorm_dot": LINEAR[1:],
    "pairwise_topk": ("test_triton_pairwise_topk",),
    "philox": ("test_flow_interpolate", "test_flow_matching_loss"),
    "search": ("test_triton_pairwise_topk", *KMEANS),
    "segments": (KMEANS[0], "test_kmeans_update_delta"),
    "tiles": (*LINEAR, "test_triton_pairwise_topk", *KMEANS),
    "tokens": ("test_adaln_modulate", "test_gated_residual", "test_gated_residual_adaln"),
}
"""Module -> the files of tests/kernels that test its kernels."""

SIZES = {"n", "m", "k", "rows", "columns", "depth", "tokens", "features", "width", "elements", "wide", "high", "end",
         "count", "span", "SIZE", "listed", "samples"}  # fmt: skip
"""Names that end an axis."""

UNNOTICEABLE = {
    "a choice of tiles or of the way: the numbers are the same": (
        ("attention.py", "itemsize == 4 -> False"),
        ("attention_backward.py", "itemsize == 4 -> False"),
        ("kmeans_assign.py", "k > 1 -> True"),
        ("linear_grad_dot.py", "itemsize == 4 -> False"),
        ("linear_grad_dot.py", "gpu.capability >= 100 and tile.rows * tile.columns == 128 * 128 -> True"),
        ("linear_grad_sqnorm.py", "tokens == 1 -> False"),
        ("linear_grad_sqnorm.py", "max(a.element_size(), g.element_size()) == 4 -> False"),
        ("linear_grad_sqnorm.py", "tokens > 64 and groups * pairs >= gpu.processors -> False"),
        ("linear_grad_sqnorm_direct.py", "multiplied_bytes(a, g) == 4 -> False"),
        ("linear_grad_sqnorm_dot.py", "at_once(input, grad_output, direction) -> False"),
        ("linear_grad_sqnorm_dot.py", "input.shape[1] < 2 -> False"),
        ("linear_grad_sqnorm_dot.py", "at_once(a, g, m) -> True"),
    ),
    "the interpreter stores in order, so that the right column comes last; a GPU has no order": (
        ("kmeans_assign.py", "(near > 0) & (place < WIDTH) -> (place < WIDTH)"),
    ),
    "what lies past the end is masked where it is loaded, or stored: loops saved": (
        ("adaln_modulate_backward.py", "tl.minimum(first + own, tokens) -> (first + own)"),
        ("gated_residual_backward.py", "tl.minimum(first + own, tokens) -> (first + own)"),
        ("gated_residual_adaln_backward.py", "tl.minimum(first + own, tokens) -> (first + own)"),
        ("linear_grad_dot.py", "tl.minimum(depth, (tile + 1) * share) -> ((tile + 1) * share)"),
        ("pairwise_topk.py", "tl.minimum(begin + share, m) -> (begin + share)"),
        ("pairwise_topk.py", "(c < m)[None, :] & (r < n)[:, None] -> ((c < m)[None, :])"),
        ("pairwise_topk.py", "r < n -> r <= n"),
    ),
    "work saved: what is compared exactly comes out the same": (
        ("kmeans_assign.py", "finite & of_two & (certain == 0) -> (finite & of_two)"),
        (
            "pairwise_topk.py",
            "tl.max(wanted.to(tl.int32), axis=0) > 0 -> (tl.max(wanted.to(tl.int32), axis=0) > 0) | "
            "((tl.max(wanted.to(tl.int32), axis=0) > 0) == (tl.max(wanted.to(tl.int32), axis=0) > 0))",
        ),
        ("search.py", "tl.minimum(2 * reach + smallest + 2 * slope, largest) -> (2 * reach + smallest + 2 * slope)"),
    ),
    "row 0, read where none is listed, has NaN for its least v, which no v reaches; on a GPU anything": (
        ("kmeans_assign.py", "tl.load(least_ptr + row, mask=listed, other=float('inf')) -> tl.load(least_ptr + row)"),
    ),
    "rows that are not finite: their distances are not either, and their indices mean nothing": (
        ("kmeans_assign.py", "finite & of_two -> (of_two)"),
        ("pairwise_topk.py", "finite -> (finite) | ((finite) == (finite))"),
        (
            "search.py",
            "tl.minimum(tl.maximum(largest * (1 / 127), LEAST), MOST) -> (tl.maximum(largest * (1 / 127), LEAST))",
        ),
    ),
    "v past the last centroid is below every number's: no such column leads; for what a GPU may make of NaN": tuple(
        (
            "kmeans_assign.py",
            f"tl.minimum(tl.load({of}, mask=inside, other=0), k - 1) -> (tl.load({of}, mask=inside, other=0))",
        )
        for of in ("index_ptr + row * 2", "index_ptr + row * 2 + 1")
    ),
    "a block never straddles the end of the lists; where nothing is listed, all is wanted": (
        ("pairwise_topk.py", "place < listed -> place <= listed"),
    ),
    "every point is kept in one slot, and slots that are not asked for hold infinity": (
        ("pairwise_topk.py", "(kept == worst) & (kept_point == worst_point) -> (kept_point == worst_point)"),
        ("pairwise_topk.py", "slot < k -> (slot < k) | ((slot < k) == (slot < k))"),
        ("pairwise_topk.py", "slot < k -> slot <= k"),
        (
            "pairwise_topk.py",
            "kept_point == best_point -> (kept_point == best_point) & "
            "((kept_point == best_point) != (kept_point == best_point))",
        ),
    ),
    "an empty grid, which the interpreter runs and a GPU refuses": (("segments.py", "sums.numel() -> True"),),
}
"""Why no test here can notice a change -> (file name, "before -> after")."""


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes ``start`` to ``end`` of the file ``path`` become ``after``."""

    path: Path
    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int
    tests: tuple[str, ...]
    """Files of tests/kernels, without ".py"."""

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}: {self.kind}: {self.before} -> {self.after}"

    def source(self) -> bytes:
        """The file with the change."""
        whole = (ROOT / self.path).read_bytes()
        return whole[: self.start] + self.after.encode() + whole[self.end :]


def mutants(module: str) -> list[Mutant]:
    """All changes of one module, from top to bottom."""
    path = KERNELS / f"{module}.py"
    source = (ROOT / path).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        kernel = any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        for kind, node, after in (in_kernel if kernel else in_launcher)(function):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            before = ast.unparse(node)
            if after != before:
                found[start, end, after] = Mutant(path, node.lineno, kind, before, after, start, end, TESTS[module])
    return [found[place] for place in sorted(found)]


def in_kernel(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr, str]]:
    """Kind, node and what to write instead."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if any(keyword.arg == "mask" for keyword in node.keywords):
                bare = deepcopy(node)
                bare.keywords = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
                yield "no mask", node, ast.unparse(bare)
            elif name == "tl.where":
                condition = ast.unparse(node.args[0])
                yield "always", node.args[0], f"({condition}) | (({condition}) == ({condition}))"
                yield "never", node.args[0], f"({condition}) & (({condition}) != ({condition}))"
            elif name == "tl.minimum":
                for argument in node.args:
                    yield "no minimum", node, f"({ast.unparse(argument)})"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd) and logical(node):
            yield "one side", node, f"({ast.unparse(node.left)})"
            yield "one side", node, f"({ast.unparse(node.right)})"
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt) and ends_axis(node.comparators[0]):
            wider = deepcopy(node)
            wider.ops = [ast.LtE()]
            yield "one more", node, ast.unparse(wider)


def in_launcher(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr, str]]:
    """Guards: those that return are never true, others always."""
    for node in ast.walk(function):
        if isinstance(node, ast.If) and not node.orelse:
            leaves = isinstance(node.body[-1], ast.Return)
            yield "no guard", node.test, "False" if leaves else "True"


def logical(node: ast.BinOp) -> bool:
    """Whether ``&`` joins conditions, not bits."""
    bits = (ast.BitAnd, ast.BitOr)
    return not any(
        isinstance(side, (ast.Constant, ast.UnaryOp)) or (isinstance(side, ast.BinOp) and not isinstance(side.op, bits))
        for side in (node.left, node.right)
    )


def ends_axis(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in SIZES


class Copy:
    """The package and its kernel tests in a folder of their own, where one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        skip = shutil.ignore_patterns("__pycache__")
        for name in ("diffprune", "tests/kernels", "tests/emulator", "csrc"):
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def run(self, path: Path, source: bytes, tests: tuple[str, ...], limit: float) -> tuple[str, str, float]:
        """What the tests say of this source: "passed", "failed" or "time", the first that failed, and the seconds."""
        path = self.folder / path
        original = path.read_bytes()
        path.write_bytes(source)
        log, begin = self.folder / "log", time.monotonic()
        try:
            child = os.fork()
            if child == 0:
                self._test(tests, log)
            while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - begin < limit:
                time.sleep(0.05)
            if ended[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "time", "", time.monotonic() - begin
        finally:
            path.write_bytes(original)
        lines = log.read_text(errors="replace").splitlines()
        first = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else "")
        if os.waitstatus_to_exitcode(ended[1]) not in (0, 1) and first.startswith("ERROR"):
            raise SystemExit(f"the tests could not be collected: {first}")
        return "passed" if ended[1] == 0 else "failed", first, time.monotonic() - begin

    def _test(self, tests: tuple[str, ...], log: Path) -> None:
        """In the child: never returns."""
        status = 3
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.chdir(self.folder)
            sys.path[:0] = [str(self.folder), str(self.folder / "tests")]
            import pytest

            options = [
                "-x",
                "-q",
                "--tb=line",
                "--assert=plain",
                "-o",
                "addopts=",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:faulthandler",
            ]
            options += ["-k", "not reference and not cpu and not compiled and not gradcheck"]  # other code's
            status = int(pytest.main([*options, *(f"tests/kernels/{name}.py" for name in tests)]))
        finally:
            os._exit(status)


def main() -> int:
    """See the module."""
    return command_line(__doc__, "modules", TESTS, mutants, UNNOTICEABLE)


def command_line(
    about: str | None,
    what: str,
    tests: Mapping[str, tuple[str, ...]],
    mutants: Callable[[str], list[Mutant]],
    unnoticeable: Mapping[str, tuple[tuple[str, str], ...]],
) -> int:
    """What the user asks for, of ``tests``' keys, which are ``what``: the exit status."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar=what, help=f"of {', '.join(tests)}; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="changes tested side by side")
    parser.add_argument("--match", default="", help="only changes whose line this pattern is found in")
    parser.add_argument("--seconds", type=float, help="limit of one test run; default: by how long it takes unchanged")
    parser.add_argument("--list", action="store_true", help="print the changes and end")
    options = parser.parse_args()
    if unknown := set(options.names) - set(tests):
        parser.error(f"expected {what} of {', '.join(tests)}, got {', '.join(sorted(unknown))}")
    names = options.names or list(tests)
    work = [mutant for name in names for mutant in mutants(name) if re.search(options.match, str(mutant))]
    if options.list:
        print(*work, sep="\n")
        return 0
    equivalent = {change: why for why, changes in unnoticeable.items() for change in changes}
    return survive(work, equivalent, options.jobs, options.seconds)


def survive(work: list[Mutant], equivalent: dict[tuple[str, str], str], jobs: int, seconds: float | None = None) -> int:
    """Test all changes; prints what became of each. 1 if one survived that ``equivalent`` has no reason for.

    ``seconds``: after so many the tests count as failed; without, each set of them is run unchanged first.
    """
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    import pytest  # noqa: F401 (these here, so that children have them)
    import torch._dynamo  # noqa: F401
    import triton.runtime.interpreter  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Copy] = Queue()
        for number in range(jobs):
            copies.put(Copy(Path(folder, str(number))))
        limits = {tests: seconds or limit(copies, tests) for tests in dict.fromkeys(mutant.tests for mutant in work)}
        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(lambda mutant: test(copies, mutant, limits[mutant.tests], equivalent), work))
    print(*(f"{count} {result}" for result, count in Counter(results).items()), sep=", ")
    return int("SURVIVED" in results)


def limit(copies: Queue[Copy], tests: tuple[str, ...]) -> float:
    """Seconds after which a change counts as noticed: several times what the tests take as things are."""
    copy = copies.get()
    try:
        result, first, seconds = copy.run(Path("pyproject.toml"), (ROOT / "pyproject.toml").read_bytes(), tests, 3600)
    finally:
        copies.put(copy)
    if result != "passed":
        sys.exit(f"{', '.join(tests)}: fail as things are: {first}")
    print(f"{', '.join(tests)}: {seconds:.0f} s as things are", flush=True)
    return 4 * seconds + 60


def test(copies: Queue[Copy], mutant: Mutant, seconds: float, equivalent: dict[tuple[str, str], str]) -> str:
    """What became of one change."""
    copy = copies.get()
    try:
        result, first, took = copy.run(mutant.path, mutant.source(), mutant.tests, seconds)
    finally:
        copies.put(copy)
    if result != "passed":
        print(f"{took:4.0f} s noticed   {mutant}  [{first[:120] or 'did not end'}]", flush=True)
        return "noticed"
    why = equivalent.get((mutant.path.name, f"{mutant.before} -> {mutant.after}"))
    print(f"{took:4.0f} s {'equivalent' if why else 'SURVIVED'} {mutant} {why or ''}", flush=True)
    return "equivalent" if why else "SURVIVED"


if __name__ == "__main__":
    sys.exit(main())
