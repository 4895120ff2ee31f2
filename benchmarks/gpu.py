"""Builds, tests and measures the kernels on this machine's GPU, in under 8 minutes: ``python -m benchmarks.gpu``.

Needs Python, PyTorch, NumPy, pyarrow, safetensors and, for what they are for, nvcc, Triton and pytest; a source
checkout, nothing installed from it; no network. Leaves ``benchmarks/results/<device>.json``, written as it goes. Exit
status: 0; 1 if a kernel test failed or a result was wrong; 2 if there is nothing to measure on.

Without a GPU: ``--device cpu --quick`` runs every benchmark once at a tiny size, to show that it runs; ``--table``
prints the tables of benchmarks/README.md from the results that are there. ``--sanitize`` measures nothing: it builds
csrc and runs the tests of odd sizes under compute-sanitizer, where that is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_results as results
from benchmarks.gpu_case import Scale
from benchmarks.gpu_cases_scoring import SCORING
from benchmarks.gpu_cases_training import TRAINING
from benchmarks.gpu_steps import ROOT, build, idle_time, kernel_tests, run_worker, sanitized_tests, sanitizer
from benchmarks.gpu_worker import CASES, key, plan, run_op
from diffprune.files import sha256_file, write_json
from diffprune.kernels.dispatch import CONFIRMED

TOTAL = 465.0
"""Seconds for all."""
BUILD, TESTS = 150.0, 175.0
"""Seconds at most for these two, and a few in which they say how far they came: some are left to measure in."""
OP, EACH = 75.0, 45.0
"""Seconds at most for one op, and for one way to compute one of its cases, compilation included."""
IDLE_AFTER, IDLE = "score_dit_b2", 60.0
"""The op after which the device's idle time is measured, and seconds at most for it."""
STEP, STEP_EACH = 130.0, 80.0
"""The same for a training step, whose whole model is compiled, and for scoring passes, next to the loop over images."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _options(arguments)
    if options.table:
        planned = [row for op in CASES if op != "ceilings" for row in plan(op, Scale(torch.device("cuda"), False))]
        print(results.markdown(results.RESULTS, [row for row in planned if row["ours"]]), end="")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured. --device cpu --quick tries the code without one.",
              file=sys.stderr)  # fmt: skip
        return 2
    if options.device == "cpu" and not options.quick:
        print("on a CPU these sizes take hours: add --quick", file=sys.stderr)
        return 2
    os.environ.pop(CONFIRMED, None)  # what "auto" takes is then the same for everyone
    return Run(options).run()


class Run:
    """One run of the command: its result so far, and where that goes."""

    def __init__(self, options: argparse.Namespace, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self.clock = options, clock
        self.deadline = clock() + options.seconds
        self.scale = Scale(torch.device(options.device), options.quick)
        device = _device_name(options.device)
        partial = options.quick or options.only or options.sanitize  # not what the tables are made of: no file unasked
        self.out = options.out or (None if partial else results.RESULTS / results.file_name(device))
        self.result: dict[str, Any] = {
            "device": device,
            "versions": _versions(),
            "sources": _sources(),
            "arguments": {"only": options.only, "quick": options.quick, "skip_tests": options.skip_tests},
            "records": [],
            "ceilings": {},
            "finished": False,
        }

    def run(self) -> int:
        """Everything; returns the exit status."""
        begin = self.clock()
        if self.options.device == "cuda":
            self._step("build", "building csrc", lambda: build(min(BUILD, self._left()), _architectures()))
            if self.options.sanitize:
                self._step("tests", "running tests/kernels under compute-sanitizer",
                           lambda: sanitized_tests(self._left(), sanitizer()))  # fmt: skip
            elif not self.options.skip_tests:
                self._step("tests", "running tests/kernels", lambda: kernel_tests(min(TESTS, self._left())))
        if not self.options.sanitize:
            for op in ["ceilings", *(self.options.only or [name for name in CASES if name != "ceilings"])]:
                self._say(f"measuring {op}")
                self.measure(op)
                if op == IDLE_AFTER and self.options.device == "cuda":
                    self._step("idle", "measuring the time that score leaves the device idle",
                               lambda: idle_time(min(IDLE, self._left())))  # fmt: skip
        self._note("finished", True)
        self._note("confirmed", results.confirmed(self.result))
        self._note("seconds", round(self.clock() - begin, 1))
        self._report()
        return 1 if results.failed(self.result) else 0

    def measure(self, op: str) -> None:
        """Add the records of one op; one for whatever there was no time for too."""
        try:
            planned = {key(row): row for row in plan(op, self.scale)}
        except Exception as error:  # importing an implementation may fail in many ways; the other ops go on
            self._note("errors", {**self.result.get("errors", {}), op: f"{type(error).__name__}: {error}"})
            return

        def emit(record: dict[str, Any]) -> None:
            row = planned.pop(record["key"] if "key" in record else key(record))
            self.result["records"].append({**row, **record, "key": key(row)})
            self._judge()

        limit, each = (STEP, STEP_EACH) if op in SCORING or op in TRAINING else (OP, EACH)
        seconds, reason = min(limit, self._left()), None
        if seconds <= 0:
            reason = "time was up before"
        elif self.options.device == "cuda":
            reason = run_worker(op, self._command(op), emit, seconds=seconds, seconds_each=each)
        else:
            run_op(op, self.scale, lambda r: None if "started" in r else emit(r))
        for row in list(planned.values()):
            emit({**row, "status": "skipped", "reason": reason or "not run by the worker"})

    def _command(self, op: str) -> Callable[[Path, list[str]], list[str]]:
        fixed = [sys.executable, "-m", "benchmarks.gpu_worker", op, *["--quick"] * self.options.quick]
        return lambda records, done: [*fixed, "--records", str(records), "--done", json.dumps(done)]

    def _judge(self) -> None:
        records = self.result["records"]
        ceilings = {r["implementation"]: r for r in records if r["op"] == "ceilings" and r["status"] == "ok"}
        self.result["ceilings"] = {
            name: (r["bytes"] if name == "copy" else r["operations"]) / r["median_s"] for name, r in ceilings.items()
        }
        results.judge(records, self.result["ceilings"])
        self._write()

    def _step(self, name: str, what: str, step: Callable[[], dict[str, Any]]) -> None:
        """Note what a step found. One that cannot even be tried does not keep the others from it."""
        self._say(what)
        try:
            self._note(name, step())
        except Exception as error:
            self._note(name, {"status": "error", "reason": f"{type(error).__name__}: {error}"})

    def _note(self, name: str, value: Any) -> None:
        self.result[name] = value
        self._write()

    def _write(self) -> None:
        if self.out:
            write_json(self.out, self.result)

    def _left(self) -> float:
        return self.deadline - self.clock()

    def _say(self, text: str) -> None:
        print(f"[{self.options.seconds - self._left():5.0f} s] {text}", file=sys.stderr, flush=True)

    def _report(self) -> None:
        for name in ("build", "tests", "idle"):
            step = self.result.get(name, {})
            if step.get("status") not in (None, "ok"):
                print(f"{name}: {step['status']} {step.get('reason', '')}", *step.get("last_lines", []), sep="\n  ")
        if tests := self.result.get("tests"):
            print("tests:", *(f"{tests[k]} {k}" for k in ("passed", "failed", "skipped") if k in tests))
            if "errors" in tests:
                print(f"compute-sanitizer: {'no summary' if tests['errors'] is None else tests['errors']} errors")
            print(*(f"  {name}" for name in tests.get("failed_tests", [])[:40]), sep="\n")
        if "idle_share" in self.result.get("idle", {}):
            print(results.idle(self.result["idle"]))
        for op, error in self.result.get("errors", {}).items():
            print(f"{op}: {error}")
        for r in self.result["records"]:
            if r["status"] in ("wrong", "error", "skipped"):
                reason = r.get("reason", "").strip().splitlines()
                print(f"{r['key']}: {r['status']}: {reason[-1][:200] if reason else ''}")
        print(results.short_table(self.result))
        if self.result["confirmed"]:
            print('For impl="auto" to take, on this machine, what is right and not slower than PyTorch\'s own:')
            print(f"  export {CONFIRMED}={self.result['confirmed']}")
        print(f"{self.result['seconds']:.0f} s; " + (f"written to {self.out}" if self.out else "no file written"))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = [op for op in CASES if op != "ceilings"]
    parser.add_argument("--out", type=Path, help="the JSON; default benchmarks/results/<device>.json")
    parser.add_argument("--only", nargs="+", choices=ops, metavar="OP",
                        help=f"measure these alone; no file without --out. One of: {', '.join(ops)}")  # fmt: skip
    parser.add_argument("--skip-tests", action="store_true", help="do not run tests/kernels")
    parser.add_argument("--sanitize", action="store_true", help="run tests/kernels under compute-sanitizer, and end")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; no file without --out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="time for everything (default %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the tables of the results that are there, and end")
    return parser.parse_args(arguments)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}"


def _architectures() -> str:
    """What to compile for: less than a package is for, to save time. sm_90a runs the kernels for sm_80 too."""
    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else "80;90a;100" if major >= 10 else "80"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name, packages in (("triton", ("triton",)), ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy")),
                           ("flash-kmeans", ("flash-kmeans",))):  # fmt: skip
        for package in packages:
            try:
                found[name] = version(package)
            except PackageNotFoundError:
                continue
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if os.path.exists(nvcc):
        found["nvcc"] = _last_word([nvcc, "--version"], "release ")
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        found["driver"] = _last_word(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], "")
    return found


def _last_word(command: list[str], after: str) -> str:
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return output.partition(after)[2].split(",")[0].split("\n")[0].strip() if after else output.split("\n")[0].strip()


def _sources() -> str:
    """Digest of the kernels and benchmarks that ran: two results of one digest measured the same code."""
    folders = ("csrc", "diffprune/kernels", "diffprune/models", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files = [path for path in files if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")]
    text = "\n".join(f"{path.relative_to(ROOT)} {sha256_file(path)}" for path in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
