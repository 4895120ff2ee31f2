"""The parts of a run that are other processes: building the extension, the tests, and a worker per op."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = {"PASSED": "passed", "XFAIL": "passed", "FAILED": "failed", "ERROR": "failed", "XPASS": "failed",
            "SKIPPED": "skipped"}  # fmt: skip
SANITIZED = "odd_sizes or tails or tiles or forms or strided"
"""The tests, by parts of their names, in which kernels meet the ends of their arguments."""
COMPILED_ONLY = ("test_triton_aot.py", "test_cpp_bounds.py")
"""Tests that run nothing on a GPU, and take all cores for a while."""
_PLAIN = re.compile(r"^(tests/.*?::.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
_PARALLEL = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS) (tests/.*)$")
_COLLECTION = re.compile(r"^ERROR (tests/\S+)")
_FAILURES, _SUMMARY = (
    re.compile(r"^=+ (FAILURES|ERRORS) =+$"),
    re.compile(r"^=+ .*(summary|warnings| in [\d.]+s).* =+$"),
)
TRACEBACKS = 3000
"""Lines of them that are kept."""
LAST_WORDS = 15.0
"""Seconds in which a process whose time is up may say what it knows: pytest tells why tests failed when it ends, and
pytest-xdist gives its workers ten seconds to end before it."""


def build(seconds: float, architectures: str) -> dict[str, Any]:
    """Run csrc/cuda_build.py. Its failure is in the result, status "failed"."""
    script = ROOT / "csrc" / "cuda_build.py"
    if not script.exists():
        return {"status": "skipped", "reason": f"no {script.relative_to(ROOT)}"}
    defaults = {"DIFFPRUNE_CUDA": "1", "DIFFPRUNE_CUDA_ARCHS": architectures}
    status, output, wall = run_limited([sys.executable, str(script)], seconds, defaults | dict(os.environ))
    return {"status": "ok" if status == 0 else "failed", "seconds": wall, **_end(status, output, seconds)}


def sanitizer() -> str | None:
    """NVIDIA's compute-sanitizer, or None: it is a package of its own beside nvcc's."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import cuda_build

    nvcc = cuda_build.find_nvcc()
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    places = [folder / "compute-sanitizer" for folder in (*folders, Path("/usr/local/cuda/bin"))]
    return shutil.which("compute-sanitizer") or next((str(path) for path in places if path.exists()), None)


def sanitized_tests(seconds: float, tool: str | None) -> dict[str, Any]:
    """tests/kernels at odd sizes under ``compute-sanitizer --tool memcheck``: as ``kernel_tests``, and "errors".

    PyTorch's memory pool is switched off: within it, one tensor's end is another's beginning.
    """
    if tool is None:
        return {"status": "unavailable", "reason": "needs compute-sanitizer, on the PATH or beside nvcc"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "86", "--print-limit", "20"]
    command += ["--target-processes", "application-only"]  # not the compilers that Triton starts
    command += ["--report-api-errors", "no"]  # a call that asks what the device can do may fail
    command += [sys.executable, "-m", "pytest", "tests/kernels", "-v", "-k", SANITIZED, "--tb=short"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = kernel_tests(seconds, command, environment)
    found = re.findall(r"ERROR SUMMARY: (\d+) error", "\n".join(result["last_lines"]))
    result["errors"] = sum(map(int, found)) if found else None
    if result["errors"] or result.get("exit_status") == 86:
        result["status"] = "failed"
    return result


def kernel_tests(
    seconds: float, command: list[str] | None = None, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run tests/kernels: how many passed, failed and were skipped, by file too; names of failed ones, and tracebacks.

    Status "ok", "failed", "error" (did not finish, or could not run), or "unavailable" where there is no pytest.
    """
    if command is None and find_spec("pytest") is None:
        return {"status": "unavailable", "reason": "needs the package pytest"}
    options = ["-v", "--tb=short", "-rs", "-o", "addopts=", "-p", "no:cacheprovider"]
    options += [f"--ignore=tests/kernels/{name}" for name in COMPILED_ONLY]
    if find_spec("xdist"):  # by file: the tests of far rows take up to 17 GB each, one process holds them
        options += ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2))), "--dist", "loadfile"]
    if find_spec("pytest_timeout"):  # by a thread: a signal does not end the wait for a kernel that hangs
        options += ["--timeout", "60", "--timeout-method", "thread"]
    command = command or [sys.executable, "-m", "pytest", "tests/kernels", *options]
    status, output, wall = run_limited(command, seconds, dict(os.environ) | (environment or {}))
    outcomes = parse_tests(output)
    counts = Counter(outcomes.values())
    files: dict[str, Counter] = {}
    for test, outcome in outcomes.items():
        files.setdefault(test.split("::")[0], Counter())[outcome] += 1
    failed = sorted(test for test, outcome in outcomes.items() if outcome == "failed")
    result = "failed" if failed else "ok" if status == 0 else "error"
    total = {name: counts[name] for name in ("passed", "failed", "skipped")}
    by_file = {name: dict(counter) for name, counter in sorted(files.items())}
    more = {"failed_tests": failed[:200], "tracebacks": tracebacks(output), **_end(status, output, seconds)}
    return {"status": result, "seconds": wall, **total, "by_file": by_file, **more}


def idle_time(seconds: float) -> dict[str, Any]:
    """What benchmarks/gpu_idle.py finds: "idle_share" and more; status "ok", or "unavailable" and why."""
    if find_spec("pyarrow") is None:
        return {"status": "unavailable", "reason": "needs the package pyarrow, which reads and writes tables"}
    status, output, wall = run_limited([sys.executable, "-m", "benchmarks.gpu_idle"], seconds, dict(os.environ))
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if status != 0 or not lines:
        return {"status": "error", "seconds": wall, **_end(status, output, seconds)}
    return {"status": "ok", **json.loads(lines[-1])}


def tracebacks(output: str) -> list[str]:
    """The lines in which pytest says why tests failed, the first ``TRACEBACKS`` of them."""
    lines = output.splitlines()
    heads = [i for i, line in enumerate(lines) if _FAILURES.match(line)]
    if not heads:
        return []
    ends = (i for i, line in enumerate(lines) if i > heads[0] and _SUMMARY.match(line))
    return lines[heads[0] : next(ends, len(lines))][:TRACEBACKS]


def parse_tests(output: str) -> dict[str, str]:
    """Test -> "passed", "failed" or "skipped", from ``pytest -v``'s lines; also of a run that was killed."""
    outcomes = {}
    for line in output.splitlines():
        if match := _PLAIN.match(line):
            outcomes[match[1]] = OUTCOMES[match[2]]
        elif match := _PARALLEL.match(line):
            outcomes[match[2].strip()] = OUTCOMES[match[1]]
        elif match := _COLLECTION.match(line):
            outcomes[match[1]] = "failed"
    return outcomes


def run_worker(
    op: str,
    command: Callable[[Path, list[str]], list[str]],
    emit: Callable[[dict[str, Any]], None],
    *,
    seconds: float,
    seconds_each: float,
) -> str | None:
    """Run workers until every measurement of ``op`` is recorded; None, or why some are missing.

    Args:
        command: the worker's command line, from the file of its records and the keys that it must leave out.
        emit: called with each record, and for a measurement that killed its worker or took longer than
            ``seconds_each`` with {"key", "status": "error", "reason"}: the next worker starts after it.
        seconds: for all of them.
    """
    deadline, done = time.monotonic() + seconds, []
    with tempfile.TemporaryDirectory() as folder:
        while True:
            records, log = Path(folder, f"{len(done)}.jsonl"), Path(folder, f"{len(done)}.log")
            before = len(done)
            reason = _watch(command(records, done), records, log, emit, done, deadline, seconds_each)
            if reason is None or reason.startswith("time"):
                return reason
            if len(done) == before:
                return reason


def _watch(
    command: list[str], records: Path, log: Path, emit: Callable, done: list[str], deadline: float, each: float
) -> str | None:
    """One worker to its end. None if it finished; else why not."""
    records.touch()
    process = _start(command, log, dict(os.environ))
    try:
        return _follow(process, records, log, emit, done, deadline, each)
    finally:
        _kill(process)


def _follow(
    process: subprocess.Popen, records: Path, log: Path, emit: Callable, done: list[str], deadline: float, each: float
) -> str | None:
    seen, current, since = 0, None, time.monotonic()
    while True:
        status = process.poll()
        lines = records.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines[seen:]:
            if not line.endswith("\n"):
                break
            seen, since, message = seen + 1, time.monotonic(), json.loads(line)
            if "started" in message:
                current = message["started"]
            else:
                done.append(current)
                current = None
                emit(message)
        now = time.monotonic()
        if status is None and now < deadline and not (current and now - since > each):
            time.sleep(0.05)
            continue
        if status == 0:
            return None
        if status is None and now >= deadline:
            return f"time was up{f' during {current}' if current else ''}"
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        reason = f"did not finish in {each:g} s" if status is None else f"the worker ended with status {status}: {last}"
        if current:
            done.append(current)
            emit({"key": current, "status": "error", "reason": reason})
        return reason


def run_limited(command: list[str], seconds: float, env: dict[str, str]) -> tuple[int | None, str, float]:
    """Exit status (None if it was stopped after ``seconds``), what it printed, and its seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process = _start(command, log, env)
        try:
            status = process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            status = None
            _interrupt(process)
        finally:
            _kill(process)
        output = log.read_text(encoding="utf-8", errors="replace")
    return status, output, round(time.monotonic() - begin, 2)


def _start(command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    with open(log, "wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env | {"PYTHONPATH": path}, stdin=subprocess.DEVNULL,
                                stdout=file, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def _interrupt(process: subprocess.Popen) -> None:
    """As Ctrl-C does; then end what is left of the session: processes that wait for a kernel do not hear of it."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=LAST_WORDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill(process: subprocess.Popen) -> None:
    """End the process, and those that it started (its session)."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end(status: int | None, output: str, seconds: float) -> dict[str, Any]:
    reason = {"reason": f"did not finish in {seconds:.0f} s"} if status is None else {"exit_status": status}
    return {**reason, "last_lines": output.splitlines()[-25:]}
