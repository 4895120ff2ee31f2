"""Compile the Triton kernels ahead of time, without a GPU: ``python -m diffprune.kernels.aot [op ...]``.

Each launcher in ``kernels/triton`` is run on meta tensors of the sizes that matter (its ``aot_cases``), once per
target, while a stand-in for the CUDA driver lets Triton specialise and compile what is launched but launch nothing. So
the table shows the configurations that the launcher really picks. Exit status 1 if a kernel spills registers, wants
more shared memory than the device has, multiplies matrices of 8- or 16-bit elements without the device's matrix
instructions, or rounds float32 to multiply it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules

from diffprune.kernels import triton as package
from diffprune.kernels.triton import TARGETS, Case, Gpu

MATRIX = {80: ("mma.sync",), 90: ("wgmma.mma_async",), 100: ("tcgen05.mma", "mma.sync")}
"""PTX instructions that a product of 8- or 16-bit elements may use; others of these are too slow for the device."""


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one target. Sizes are in bytes, registers per thread."""

    op: str
    kernel: str
    target: int
    cases: tuple[str, ...]
    constants: dict[str, str]
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    """Local memory per thread: spilled registers, or an array that could not stay in registers."""
    shared: int
    matrix: dict[str, int]
    """PTX matrix instruction, "tf32" behind it if it is one of that -> how often it is in the code."""
    products: bool
    """Whether the kernel multiplies matrices of 8- or 16-bit elements."""
    losses: tuple[str, ...] = ()
    """What ptxas says it made slow."""
    error: str = ""
    """Why a case did not compile; the row has no kernel then."""

    @property
    def faults(self) -> list[str]:
        """What is wrong with it; empty if nothing is."""
        faults = [f"does not compile: {self.error}"] if self.error else []
        limit = TARGETS[self.target].shared
        if self.spilled:
            faults.append(f"spills {self.spilled} bytes per thread")
        if self.shared > limit:
            faults.append(f"wants {self.shared} bytes of shared memory, the device has {limit}")
        if any(name.endswith("tf32") for name in self.matrix):
            faults.append("multiplies float32 rounded to TF32")
        fitting = MATRIX[self.target]
        if self.products and not (self.matrix and set(self.matrix) <= set(fitting)):
            faults.append(
                f"multiplies matrices with {', '.join(self.matrix) or 'no matrix instruction'}, "
                f"expected {' or '.join(fitting)}"
            )
        return faults + [f"ptxas: {loss}" for loss in self.losses]


def ops() -> list[str]:
    """The ops that have a Triton implementation with cases to compile."""
    names = sorted(module.name for module in iter_modules(package.__path__))
    return [name for name in names if hasattr(import_module(f"{package.__name__}.{name}"), "aot_cases")]


def compile_op(op: str, target: int, quick: bool = False) -> list[Compiled]:
    """Compile what the launcher of ``op`` launches on ``target`` in its cases.

    ``quick``: only in those marked so, and only in the first of them on other targets than sm_90.
    """
    module = import_module(f"{package.__name__}.{op}")
    cases = [case for case in module.aot_cases() if case.quick or not quick]
    found: dict[str, tuple[object, object, list[str]]] = {}
    failed = []
    for case in cases[:1] if quick and target != 90 else cases:
        try:
            launches = _launched(module, case, TARGETS[target])
        except Exception as error:  # whatever Triton, LLVM or ptxas raise: the table goes on and shows it as a fault
            reason = error.__cause__ or error  # Triton's own message ends with the line of code
            message = (str(reason).strip() or repr(reason)).splitlines()[-1]
            failed.append(Compiled(op, "-", target, (case.label,), {}, 0, 0, 0, 0, 0, {}, False, error=message))
            continue
        for kernel, compiled in launches:
            found.setdefault(compiled.hash, (kernel, compiled, []))[2].append(case.label)
    return [_describe(op, target, *entry) for entry in found.values()] + failed


def compile_all(names: list[str], targets: list[int], quick: bool = False) -> list[Compiled]:
    """``compile_op`` of all, on all cores."""
    jobs = [(name, target, quick) for name in names for target in targets]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(compile_op, *zip(*jobs, strict=True)) for row in rows]


def table(rows: list[Compiled]) -> str:
    """One line per kernel and target."""
    lines = [
        f"{'op':<20} {'kernel':<16} {'sm':>3} {'warps':>5} {'stages':>6} {'regs':>4} {'spill':>5} {'shared':>7}  "
        f"{'matrix instructions':<22} constants; cases"
    ]
    for row in rows:
        matrix = ", ".join(f"{count} {name}" for name, count in row.matrix.items()) or "-"
        constants = " ".join(f"{name}={value}" for name, value in row.constants.items())
        lines.append(
            f"{row.op:<20} {row.kernel:<16} {row.target:>3} {row.num_warps:>5} {row.num_stages:>6} "
            f"{row.registers:>4} {row.spilled:>5} {row.shared:>7}  {matrix:<22} {constants}; "
            f"{', '.join(row.cases)}"
        )
        lines += [f"    FAULT: {fault}" for fault in row.faults]
    return "\n".join(lines)


def markdown(rows: list[Compiled]) -> str:
    """A table with a line per kernel and configuration, and what each target makes of it: of docs/kernels.md.

    Constants that all configurations of a kernel share are left out, and numbers that are not whole: no tile has those.
    """
    kernels: dict[tuple[str, str], list[Compiled]] = {}
    for row in rows:
        kernels.setdefault((row.op, row.kernel), []).append(row)
    targets = sorted({row.target for row in rows})
    lines = ["| op, kernel | configuration | cases | " + " | ".join(f"sm_{target}" for target in targets) + " |"]
    lines.append("|---|---|--:|" + "---|" * len(targets))
    for (op, kernel), own in kernels.items():
        values = {name: {row.constants.get(name) for row in own} for name in own[0].constants}
        names = [name for name, found in values.items() if len(found) > 1 and not any("." in str(v) for v in found)]
        groups: dict[tuple[str, ...], dict[int, list[Compiled]]] = {}
        for row in own:
            key = tuple(f"{name}={row.constants[name]}" for name in names if name in row.constants)
            groups.setdefault(key, {}).setdefault(row.target, []).append(row)
        for key, by_target in groups.items():
            cases = {case for found in by_target.values() for row in found for case in row.cases}
            cells = [_cell(by_target.get(target, [])) for target in targets]
            lines.append(f"| `{op}`, `{kernel}` | {' '.join(key) or 'one'} | {len(cases)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[Compiled]) -> str:
    """Registers per thread, shared memory and matrix instructions: the most of any row; and its faults."""
    if not rows:
        return ""
    spilled = max(row.spilled for row in rows)
    matrix = {name: max(row.matrix.get(name, 0) for row in rows) for row in rows for name in row.matrix}
    parts = [f"{max(row.registers for row in rows)} regs", f"{max(row.shared for row in rows) / 1024:.0f} KiB"]
    parts += [f"{count} {name.partition('.')[0]}" for name, count in matrix.items()]
    parts += [f"**spills {spilled} bytes**"] if spilled else []
    return ", ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m diffprune.kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("ops", nargs="*", help="ops to compile (default: all)")
    parser.add_argument("--target", type=int, action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="only the cases of the default test run")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--markdown", action="store_true", help="print the table of docs/kernels.md")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - set(ops()))
    if unknown:
        parser.error(f"expected ops of {', '.join(ops())}, got {', '.join(unknown)}")
    if package.emulated():
        parser.error("TRITON_INTERPRET=1 is set: kernels are not compiled then")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Triton does unasked, but 3.9 warns
    rows = compile_all(options.ops or ops(), options.target or list(TARGETS), options.quick)
    if options.json:
        print(json.dumps([asdict(row) | {"faults": row.faults} for row in rows]))
    else:
        print(markdown(rows) if options.markdown else table(rows))
    return int(any(row.faults for row in rows))


def _launched(module, case: Case, target: Gpu) -> list[tuple[object, object]]:
    """Triton's (JITFunction, CompiledKernel) of each launch of ``module.run(*case.args)``."""
    from triton.runtime.jit import JITFunction

    launches = []
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        launches.append((kernel, run(kernel, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    try:
        with package.assume(target), _stand_in_driver(target):
            module.run(*case.args)
    finally:
        JITFunction.run = run
    return launches


@contextmanager
def _stand_in_driver(target: Gpu) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class StandIn:
        """All that Triton asks a driver before it launches."""

        def get_current_target(self):
            return GPUTarget("cuda", target.capability, 32)

        def get_current_device(self):
            return f"sm_{target.capability}"  # the key of the compiled kernels in memory

        def get_current_stream(self, device):
            return 0

    before = driver._active
    driver.set_active(StandIn())
    try:
        yield
    finally:
        driver.set_active(before)


def _describe(op: str, target: int, kernel, compiled, cases: list[str]) -> Compiled:
    ptx, resources = compiled.asm["ptx"], _resources(compiled.asm["cubin"])
    found = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b([\w.:]*)", ptx)
    instructions = [name + " tf32" * ("tf32" in kind) for name, kind in found]
    constants = {kernel.arg_names[place[0]]: str(value) for place, value in compiled.src.constants.items()}
    return Compiled(
        op=op,
        kernel=kernel.__name__,
        target=target,
        cases=tuple(cases),
        constants=constants,
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=resources["REG"],
        spilled=resources["STACK"] + resources["LOCAL"],
        shared=compiled.metadata.shared,
        matrix={name: instructions.count(name) for name in dict.fromkeys(instructions)},
        products=bool(re.search(r"tt\.dot\b.*: tensor<\d+x\d+x(f16|bf16|i8|f8\w*)>", compiled.asm["ttir"])),
        losses=_losses(compiled) if "wgmma.mma_async" in instructions else (),
    )


def _losses(compiled) -> tuple[str, ...]:
    """What ptxas loses when it makes machine code of the PTX, as Triton makes it: Triton itself drops what it says.

    "wgmma.mma_async instructions are serialized" is the one known: each then waits for the one before.
    """
    from triton import knobs
    from triton.compiler.compiler import make_backend

    target, log = compiled.metadata.target, StringIO()
    before, knobs.nvidia.dump_ptxas_log = knobs.nvidia.dump_ptxas_log, True
    try:
        with redirect_stdout(log):
            make_backend(target).make_cubin(compiled.asm["ptx"], {}, compiled.metadata, target.arch)
    finally:
        knobs.nvidia.dump_ptxas_log = before
    found = re.findall(r"Potential Performance Loss: (.*?)(?: in (?:the )?function .*)?$", log.getvalue(), re.MULTILINE)
    return tuple(dict.fromkeys(found))


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL ... as cuobjdump, which comes with Triton, reads them off the machine code."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


if __name__ == "__main__":
    sys.exit(main())
