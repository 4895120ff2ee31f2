"""``python -m benchmarks.gpu`` as far as it goes without a GPU: each benchmark at a tiny size, timing, JSON, tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package benchmarks is part of no distribution

from benchmarks import gpu, gpu_idle, gpu_results, gpu_steps, gpu_worker
from benchmarks.gpu_case import Case, Goal, Scale, Way, relative_error, sample_rows
from benchmarks.gpu_timing import measure, set_count
from diffprune.kernels import report

CPU = Scale(torch.device("cpu"), quick=True)
NOT_HERE = {"flash-kmeans", "CuPy", "Opacus' ghost norms", "SDPA cudnn_attention", "SDPA efficient_attention"}
"""They want a GPU, or a package that the tests do without."""


class FakeClock:
    """Time passes when ``spend`` says so."""

    def __init__(self) -> None:
        self.now, self.leads, self.waits, self.broken = 0.0, 0, 0, False

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def lead(self) -> None:
        self.leads += 1

    def mark(self) -> float:
        return self.now

    def seconds(self, begin: float, end: float) -> float:
        assert self.waits, "read before synchronize"
        return end - begin

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")
        self.waits += 1


def test_every_benchmark_runs_and_is_right_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "cpu.json"
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["finished"] and "errors" not in result
    records = result["records"]
    assert {r["op"] for r in records} == {*gpu_worker.CASES, "gated_residual_adaln"}
    for r in records:
        if r["implementation"] in NOT_HERE:
            continue
        assert r["status"] == "ok", (r["key"], r.get("reason"))
        assert r["lower_s"] <= r["median_s"] <= r["upper_s"] and r["bytes"] > 0 and r["input_sets"] == 2
    measured = [r for r in records if r["ours"]]
    assert all("error" in r for r in measured), "an implementation was timed unchecked"
    assert {r["implementation"] for r in measured} == {"reference", "cpu"}
    assert set(result["ceilings"]) == {"copy", "matmul_float16", "matmul_bfloat16"}
    values = [goal["value"] for r in measured for goal in r["goals"] if goal["against"] != ["flash-kmeans"]]
    assert values and None not in values
    labels = [r for r in records if r["implementation"] == "cdist and min"]
    assert labels and all(r["error"] == 0 for r in labels)
    printed = capsys.readouterr().out
    assert "linear_grad_sqnorm" in printed and str(out) in printed


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "x.json")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_measure_takes_median_and_quartiles_of_timed_calls_only() -> None:
    clock, calls = FakeClock(), []
    durations = iter([100.0, 100.0, 100.0, 2.0, 2.0, 2.0, 5.0, 1.0, 3.0, 2.0, 4.0, 9.0, 0.0])

    def run(number: int) -> None:
        calls.append(number)
        clock.spend(next(durations))

    timing = measure(clock, run, [(0,), (1,)], budget=0.0)
    assert (timing.lower, timing.median, timing.upper) == (1.5, 3.0, 4.5)
    assert timing.repeats == 7 and clock.leads == 10
    assert calls == [0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(("budget", "repeats"), [(0.0, 7), (12.6, 50), (100.0, 200)])
def test_measure_repeats_for_its_budget(budget: float, repeats: int) -> None:
    clock = FakeClock()
    assert measure(clock, lambda: clock.spend(0.25), [()], budget=budget).repeats == repeats


def test_set_count_outgrows_the_cache() -> None:
    assert [set_count(size, 50) for size in (150, 149, 75, 1000, 1, 0)] == [1, 2, 2, 1, 8, 8]


def test_operations_and_bytes_at_the_sizes_of_the_goals() -> None:
    full = Scale(torch.device("cuda"), quick=False)
    cases = {(c.op, c.label): c for make in gpu_worker.CASES.values() for c in make(full)}

    def counts(op: str, label: str) -> tuple[int, int]:
        return cases[op, label].operations, cases[op, label].bytes

    rows, latent, tokens, heads = 64 * 256, 32768 * 4096, 256 * 256 * 1152, 256 * 16 * 256 * 72
    mlp = 2 * (rows * (1152 + 4608) + 1152 * 4608) + 64 * 4
    assert counts("linear_grad_dot", "DiT-XL/2 MLP") == (2 * rows * 1152 * 4608, mlp)
    gram = 256 * (256 * 257 // 2) * 2 * 5760  # one triangle of A·Aᵀ and of G·Gᵀ
    assert counts("linear_grad_sqnorm", "DiT-XL/2 MLP") == (gram, 256 * 256 * 5760 * 2 + 256 * 4)
    n, d, k = 1_280_000, 768, 1000
    assert counts("kmeans_assign", "float16 points") == (2 * n * d * k, 2 * n * d + 4 * k * d + 8 * n)
    assert counts("kmeans_update", "float32 points") == (0, 4 * n * d + 4 * n + 8 * k * d + 8 * k)
    assert counts("flow_matching_loss", "float32") == (0, 2 * 4 * latent + 32768 * (8 + 4))
    assert counts("flow_matching_loss", "bfloat16, with gradient") == (0, 3 * 2 * latent + 32768 * (8 + 4 + 4))
    assert counts("adaln_modulate", "bfloat16 tokens, forward") == (0, 2 * 2 * tokens + 2 * 2 * 256 * 1152)
    assert counts("attention", "DiT-XL/2 head size 72, forward") == (4 * heads * 256, 4 * 2 * heads)
    assert counts("attention", "DiT-XL/2 head size 72, forward+backward") == (14 * heads * 256, 12 * 2 * heads)
    assert counts("ceilings", "matmul bfloat16")[0] == 2 * 8192**3 and counts("ceilings", "copy")[1] == 2 * 2**30


def one_case(*ways: Way, goals: tuple[Goal, ...] = ()) -> Case:
    def make(generator: torch.Generator) -> tuple:
        return (torch.rand(4, generator=generator),)

    return Case("op", "label", {"N": 4}, "float32", make, lambda: list(ways), 16, 0, goals)


def run_case(*ways: Way, clock: FakeClock | None = None, done: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    emitted: list[dict[str, Any]] = []
    gpu_worker.run_case(one_case(*ways), CPU, emitted.append, done, clock or FakeClock())
    return emitted


def test_a_wrong_result_has_no_speed() -> None:
    def check(inputs: tuple, output: torch.Tensor) -> float:
        return relative_error(output, 2 * inputs[0])

    nan = torch.nan
    ways = [
        Way("right", lambda x: 2 * x, True, check, 1e-6),
        Way("wrong", lambda x: 2.01 * x, True, check, 1e-6),
        Way("far", lambda x: 3 * x, False, check),  # a comparison may be: its error is told
        Way("nan", lambda x: x * nan, False, check),
        Way("check says nan", lambda x: 2 * x, True, lambda i, o: nan, 1.0),
        Way("too short", lambda x: 2 * x[:2], True, check, 1e-6),
    ]
    records = {r["implementation"]: r for r in run_case(*ways) if "started" not in r}
    statuses = {name: r["status"] for name, r in records.items()}
    assert statuses == {
        "right": "ok",
        "far": "ok",
        "wrong": "wrong",
        "nan": "wrong",
        "check says nan": "wrong",
        "too short": "wrong",
    }
    assert all(("median_s" in r) == (r["status"] == "ok") for r in records.values())
    assert records["wrong"]["error"] == pytest.approx(0.005, rel=1e-3) and "allowed 1e-06" in records["wrong"]["reason"]
    json.dumps(list(records.values()), allow_nan=False)


def test_a_result_that_turns_wrong_while_timed_has_no_speed() -> None:
    calls = []

    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x if len(calls) < 5 else x + 1

    (_, record) = run_case(Way("racy", run, True, lambda i, o: relative_error(o, i[0]), 1e-6))
    assert record["status"] == "wrong" and "after it" in record["reason"] and "median_s" not in record


def test_an_error_is_recorded_and_the_next_way_runs() -> None:
    def fails(x: torch.Tensor) -> None:
        raise ValueError("too odd")

    def refuses(x: torch.Tensor) -> None:
        raise NotImplementedError("needs float16")

    ways = (Way("a", fails), Way("b", refuses), Way("c", torch.neg, missing="needs c"), Way("d", torch.neg))
    messages = run_case(*ways)
    assert messages[::2] == [{"started": f"op/label/{name}"} for name in "abcd"]
    assert [r["status"] for r in messages[1::2]] == ["error", "refused", "unavailable", "ok"]
    assert messages[1]["reason"] == "ValueError: too odd"
    assert [r["implementation"] for r in run_case(*ways, done=("op/label/a", "op/label/c"))[1::2]] == ["b", "d"]


def test_a_broken_device_ends_the_worker_after_its_record() -> None:
    clock, emitted = FakeClock(), []

    def breaks(x: torch.Tensor) -> None:
        clock.broken = True

    with pytest.raises(gpu_worker.DeviceBroken, match="illegal"):
        case = one_case(Way("a", breaks), Way("b", torch.neg))
        gpu_worker.run_case(case, CPU, emitted.append, (), clock)
    assert [m.get("status") for m in emitted] == [None, "error"]


FAKE_WORKER = """
import json, os, sys, time
file = open(sys.argv[1], "a", buffering=1)
for name in "abcde":
    if "op/" + name in json.loads(sys.argv[2]):
        continue
    file.write(json.dumps({"started": "op/" + name}) + "\\n")
    if name == "b":
        print("segmentation fault", flush=True); os._exit(9)
    if name == "c":
        time.sleep(60)
    file.write(json.dumps({"name": name, "status": "ok"}) + "\\n")
    if name == "d":
        os._exit(3)
"""


def fake_worker(records: Path, done: list[str]) -> list[str]:
    return [sys.executable, "-S", "-c", FAKE_WORKER, str(records), json.dumps(done)]


def test_workers_that_crash_hang_or_leave_are_followed_by_others() -> None:
    records: list[dict[str, Any]] = []
    assert gpu_steps.run_worker("op", fake_worker, records.append, seconds=60, seconds_each=3) is None
    assert [r.get("name") or r["key"] for r in records] == ["a", "op/b", "op/c", "d", "e"]
    assert "status 9" in records[1]["reason"] and "segmentation fault" in records[1]["reason"]
    assert records[2]["reason"] == "did not finish in 3 s"


def test_a_worker_is_ended_when_time_is_up_and_one_that_cannot_start_is_not_repeated() -> None:
    records: list[dict[str, Any]] = []

    def hangs(path: Path, done: list[str]) -> list[str]:
        return fake_worker(path, ["op/a", "op/b"])

    assert gpu_steps.run_worker("op", hangs, records.append, seconds=1.5, seconds_each=30) == "time was up during op/c"

    def cannot(path: Path, done: list[str]) -> list[str]:
        return [sys.executable, "-S", "-c", "raise SystemExit('no torch')"]

    assert "no torch" in gpu_steps.run_worker("op", cannot, records.append, seconds=60, seconds_each=30)
    assert records == []


def test_a_real_worker_writes_its_records(tmp_path: Path) -> None:
    file = tmp_path / "records"
    arguments = ["pairwise_topk", "--records", str(file), "--device", "cpu", "--quick"]
    done = ["pairwise_topk/float32/reference"]
    assert gpu_worker.main([*arguments, "--done", json.dumps(done)]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line.get("implementation") for line in lines] == [None, "cpu", None, "cdist and topk"]


def options(tmp_path: Path, *more: str) -> Any:
    return gpu._options(["--device", "cpu", "--quick", "--out", str(tmp_path / "r.json"), *more])


def test_what_there_is_no_time_for_is_skipped_and_says_so(tmp_path: Path) -> None:
    now = [0.0]
    run = gpu.Run(options(tmp_path, "--seconds", "100"), clock=lambda: now[0])
    run.measure("kmeans_update")
    now[0] = 101.0
    run.measure("pairwise_topk")
    records = json.loads((tmp_path / "r.json").read_text())["records"]  # written before the end
    by_op = {op: {r["status"] for r in records if r["op"] == op} for op in ("kmeans_update", "pairwise_topk")}
    assert by_op == {"kmeans_update": {"ok"}, "pairwise_topk": {"skipped"}}
    assert records[-1]["reason"] == "time was up before"
    assert not json.loads((tmp_path / "r.json").read_text())["finished"]


def test_an_op_that_cannot_be_imported_fails_the_run_and_not_the_others(tmp_path: Path, monkeypatch) -> None:
    def broken(scale: Scale) -> Any:
        raise ImportError("no such kernel")

    monkeypatch.setitem(gpu_worker.CASES, "linear_grad_dot", broken)
    assert gpu.Run(options(tmp_path, "--only", "linear_grad_dot", "pairwise_topk")).run() == 1
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["errors"] == {"linear_grad_dot": "ImportError: no such kernel"}
    assert any(r["op"] == "pairwise_topk" and r["status"] == "ok" for r in result["records"])


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_on_a_gpu_builds_then_tests_then_measures(tmp_path: Path, monkeypatch, capsys, failed: bool) -> None:
    steps = []

    def worker(op: str, command: Any, emit: Any, seconds: float, seconds_each: float) -> str:
        steps.append(op)
        assert 0 < seconds <= gpu.OP and command(Path("r"), ["x"])[-1] == '["x"]'
        if op == "pairwise_topk":
            emit({"key": "pairwise_topk/float32/triton", "status": "error", "reason": "misaligned address"})
        return "time was up"

    report()  # what runs here is found out once, not while there seems to be a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        gpu, "build", lambda seconds, archs: steps.append(archs) or {"status": "failed", "reason": "g++"}
    )
    tests = {"status": "failed" if failed else "ok", "passed": 3, "failed": 1, "skipped": 0, "failed_tests": ["t"]}
    monkeypatch.setattr(gpu, "kernel_tests", lambda seconds: steps.append("tests") or tests)
    monkeypatch.setattr(gpu, "run_worker", worker)
    out = tmp_path / "x.json"
    assert gpu.main(["--only", "pairwise_topk", "--out", str(out)]) == int(failed)
    assert steps == ["90a", "tests", "ceilings", "pairwise_topk"]
    result = json.loads(out.read_text())
    statuses = {r["implementation"]: r["status"] for r in result["records"] if r["op"] == "pairwise_topk"}
    assert statuses == {"triton": "error", "cdist and topk": "skipped"}
    assert result["device"] == "NVIDIA X" and result["finished"] and result["build"]["status"] == "failed"
    printed = capsys.readouterr().out
    assert "build: failed g++" in printed and "misaligned address" in printed


SANITIZER = """#!/bin/sh
echo "tests/kernels/test_a.py::test_odd_sizes PASSED [100%]"
echo "========= ERROR SUMMARY: $ERRORS errors"
test "$ERRORS" = 0 || exit 86
"""


@pytest.mark.parametrize("errors", [0, 2])
def test_errors_of_memory_fail_a_sanitized_run(tmp_path: Path, monkeypatch, capsys, errors: int) -> None:
    """What compute-sanitizer found, though every test passed; nothing is measured, and no file written unasked."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("ERRORS", str(errors))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "build", lambda seconds, archs: {"status": "ok"})
    out = tmp_path / "x.json"
    assert gpu.main(["--sanitize", "--out", str(out)]) == int(errors > 0)
    result = json.loads(out.read_text())
    assert result["tests"]["errors"] == errors and result["tests"]["passed"] == 1 and result["records"] == []
    assert f"compute-sanitizer: {errors} errors" in capsys.readouterr().out
    assert gpu.Run(gpu._options(["--sanitize"])).out is None


def test_no_sanitizer_is_said() -> None:
    assert "needs compute-sanitizer" in gpu_steps.sanitized_tests(1.0, None)["reason"]


def test_a_step_that_cannot_be_tried_does_not_stop_the_others(tmp_path: Path, monkeypatch) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no space left")

    steps: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "build", broken)
    monkeypatch.setattr(gpu, "kernel_tests", broken)
    monkeypatch.setattr(gpu, "run_worker", lambda op, *_, **__: steps.append(op) or "time was up")
    out = tmp_path / "x.json"
    assert gpu.Run(gpu._options(["--only", "pairwise_topk", "--out", str(out)])).run() == 1
    result = json.loads(out.read_text())
    assert result["build"] == result["tests"] == {"status": "error", "reason": "OSError: no space left"}
    assert steps == ["ceilings", "pairwise_topk"] and result["finished"]


def timed(op: str, implementation: str, median: float, *goals: dict, ours: bool = True, **more: Any) -> dict[str, Any]:
    fields = {"op": op, "label": "x", "implementation": implementation, "ours": ours, "shape": {"N": 4}}
    numbers = {"median_s": median, "lower_s": median, "upper_s": median, "bytes": 300, "operations": 0}
    return {**fields, **numbers, "dtype": "float16", "status": "ok", "goals": list(goals), **more}


def goal(kind: str, factor: float, *against: str) -> dict[str, Any]:
    return {"text": f"{kind} {factor}", "kind": kind, "factor": factor, "against": list(against)}


def test_shares_and_goals() -> None:
    ceilings = {"copy": 1000.0, "matmul_float16": 400.0, "matmul_bfloat16": 200.0}
    goals = [goal("copy", 0.5), goal("bound", 0.7), goal("matmul", 0.2), goal("faster", 1.5, "SDPA")]
    ours = timed("a", "triton", 0.5, *goals, operations=160)
    half = timed("a", "cuda", 0.5, goal("matmul", 1.0), operations=160, dtype="bfloat16")
    rivals = [timed("a", name, t, ours=False) for name, t in (("SDPA x", 2.0), ("SDPA y", 1.0), ("else", 0.1))]
    part = timed("b", "triton", 0.1, goal("part", 0.25, "a"))
    slow = timed("b", "cuda", 0.2, goal("part", 0.25, "a"))
    wrong = timed("a", "cpu", 0.1, goal("copy", 0.1), status="wrong")
    gpu_results.judge([ours, half, *rivals, part, slow, wrong], ceilings)
    assert [g["value"] for g in ours["goals"]] == pytest.approx([0.6, 0.8, 0.8, 2.0])
    assert all(g["met"] for g in ours["goals"])
    assert half["share_of_matmul"] == pytest.approx(1.6) and half["share_of_bound"] == pytest.approx(1.6)
    assert part["goals"][0]["value"] == pytest.approx(0.2) and part["goals"][0]["met"]
    assert slow["goals"][0]["value"] == pytest.approx(0.4) and slow["goals"][0]["met"] is False
    assert wrong["goals"][0]["value"] is None and wrong["goals"][0]["met"] is None and "share_of_copy" not in wrong
    gpu_results.judge([ours], {})
    assert [g["met"] for g in ours["goals"]][3] is None, "nothing to compare with any more"


@pytest.mark.parametrize(
    ("tests", "ours", "status", "expected"),
    [
        ({}, True, "ok", False),
        ({"status": "ok"}, True, "error", False),
        ({"status": "failed"}, True, "ok", True),
        ({"status": "error"}, True, "ok", True),
        ({"status": "unavailable"}, True, "ok", False),
        ({"status": "ok"}, True, "wrong", True),
        ({"status": "ok"}, False, "wrong", False),
    ],
)
def test_what_fails_a_run(tests: dict, ours: bool, status: str, expected: bool) -> None:
    records = [timed("a", "triton", 1.0, ours=ours, status=status)]
    assert gpu_results.failed({"records": records, "tests": tests}) is expected


def test_what_a_run_confirms() -> None:
    """By op: the faster of ours, if it is right in every case and no slower there than others that do the same."""

    def run(*records: dict[str, Any], status: str = "ok") -> str:
        return gpu_results.confirmed({"records": list(records), "tests": {"status": status}})

    def other(op: str, median: float, **more: Any) -> dict[str, Any]:
        return timed(op, "plain", median, ours=False, error=0.0, **more)

    dot = [timed("linear_grad_dot", "triton", 2.0, error=0.0), timed("linear_grad_dot", "cuda", 1.0, error=0.0)]
    matmul = timed("linear_grad_dot", "matmul", 0.5, ours=False)  # computes less: no error
    assert run(*dot, matmul, other("linear_grad_dot", 3.0)) == "cuda:linear_grad_dot"
    assert run(*dot, other("linear_grad_dot", 1.5)) == "cuda:linear_grad_dot"
    assert run(*dot, other("linear_grad_dot", 0.9)) == ""
    assert run(*dot, other("linear_grad_dot", 0.9, status="wrong")) == "cuda:linear_grad_dot"
    slower = timed("linear_grad_dot", "cuda", 5.0, error=0.0, label="y")
    also = timed("linear_grad_dot", "triton", 4.0, error=0.0, label="y")
    assert run(*dot, slower, also) == "cuda:linear_grad_dot", "√5 is less than √8"
    assert run(*dot, slower, also, other("linear_grad_dot", 4.5, label="y")) == "triton:linear_grad_dot"
    assert run(*dot, slower | {"status": "skipped"}, also) == "triton:linear_grad_dot"
    assert run(*dot, status="error") == run(*dot, status="failed") == run(*dot, status="unavailable") == ""
    assert run(*dot, timed("pairwise_topk", "triton", 1.0, status="wrong")) == "", "one that is wrong spoils all"
    ops = ("attention", "adaln_modulate", "flow_matching_loss", "score_dit_b2")
    assert run(*(timed(op, "triton", 1.0, error=0.0) for op in ops)) == (
        "triton:adaln_modulate,triton:adaln_modulate_backward,triton:flow_matching_loss,triton:flow_matching_loss_grad"
    ), "attention takes PyTorch's own first, whatever is confirmed"


def test_table_of_results_and_of_what_no_gpu_has_run(tmp_path: Path) -> None:
    planned = [timed("a", name, 1.0, goal("copy", 0.5), status="planned") for name in ("triton", "cuda")]
    for row in planned:
        del row["median_s"]
    text = gpu_results.markdown(tmp_path, planned)
    assert text.count(f"| {gpu_results.NOT_RUN} |") == 2 and text.count("copy 0.5: not yet run on a GPU") == 2
    record = timed("a", "triton", 0.002, goal("copy", 0.5))
    gpu_results.judge([record], {"copy": 200_000.0})
    tests = {"status": "failed", "passed": 5, "failed": 1, "skipped": 2}
    result = {"device": "NVIDIA X", "versions": {"torch": "2"}, "ceilings": {"copy": 3e12}, "tests": tests}
    (tmp_path / "nvidia-x.json").write_text(json.dumps(result | {"records": [record]}))
    text = gpu_results.markdown(tmp_path, planned)
    assert "### NVIDIA X" in text and "copy 3.00 TB/s; kernel tests: 5 passed, 1 failed, 2 skipped" in text
    assert "| `a` | x, N=4 | triton | 2 ms | 2 to 2 | 0.00015 GB/s | 75% | copy 0.5: 0.75, met |" in text
    assert "| `a` | x, N=4 | cuda | not yet run on a GPU |" in text


def test_table_command_lists_every_op(capsys: pytest.CaptureFixture, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_results, "RESULTS", tmp_path)
    assert gpu.main(["--table"]) == 0
    text = capsys.readouterr().out
    for op in gpu_worker.CASES:
        assert (f"`{op}`" in text) == (op != "ceilings")
    assert "N=1280000 D=768 K=1000 | cuda | not yet run on a GPU" in text


def test_test_results_are_read_from_lines_of_whole_and_killed_runs() -> None:
    output = """
tests/kernels/test_a.py::test_one[a b] PASSED                            [ 10%]
tests/kernels/test_a.py::test_two SKIPPED (needs PASSED things)          [ 20%]
[gw3] [ 30%] FAILED tests/kernels/test_b.py::test_three[x]
[gw0] [100%] XFAIL tests/kernels/test_b.py::test_four
ERROR tests/kernels/test_c.py - ImportError: no
tests/kernels/test_d.py::test_five """
    assert gpu_steps.parse_tests(output) == {
        "tests/kernels/test_a.py::test_one[a b]": "passed",
        "tests/kernels/test_a.py::test_two": "skipped",
        "tests/kernels/test_b.py::test_three[x]": "failed",
        "tests/kernels/test_b.py::test_four": "passed",
        "tests/kernels/test_c.py": "failed",
    }


def test_kernel_tests_that_do_not_finish_or_do_not_run_are_an_error() -> None:
    text = "import time; print('tests/a.py::test_x PASSED', flush=True); time.sleep(60)"
    result = gpu_steps.kernel_tests(2.0, [sys.executable, "-S", "-c", text])
    assert result["status"] == "error" and result["passed"] == 1 and "2 s" in result["reason"]
    result = gpu_steps.kernel_tests(30.0, [sys.executable, "-S", "-c", "raise SystemExit('usage')"])
    assert result["status"] == "error" and result["exit_status"] == 1 and "usage" in result["last_lines"]


def test_kernel_tests_say_why_tests_failed_also_when_time_is_up() -> None:
    """As pytest does after Ctrl-C; a worker that waits for a kernel hears nothing of it, and is ended."""
    text = """
import subprocess, sys, time
worker = subprocess.Popen(["sh", "-c", "trap '' INT; sleep 60"])
print("tests/a.py::test_x FAILED", worker.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("=== FAILURES ===", "E   assert 3 == 4", "=== short test summary info ===", "FAILED", sep="\\n")
"""
    result = gpu_steps.kernel_tests(2.0, [sys.executable, "-S", "-c", text])
    assert result["status"] == "failed" and result["failed"] == 1 and "2 s" in result["reason"]
    assert result["tracebacks"] == ["=== FAILURES ===", "E   assert 3 == 4"]
    worker = int(result["last_lines"][0].split()[-1])
    for _ in range(50):
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


def test_a_broken_device_fails_one_test_alone(tmp_path: Path) -> None:
    """Not those that come after it in the process."""
    pretend = """
import torch
torch.cuda.is_available = lambda: True
broken = []
def synchronize():
    if broken:
        raise RuntimeError("an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
"""
    tests = """
import pretend
def test_first(): pass
def test_breaks(): pretend.broken.append(True)
def test_later(): assert not pretend.broken
"""
    (tmp_path / "pretend.py").write_text(pretend)
    (tmp_path / "test_some.py").write_text(tests)
    shutil.copy(gpu_steps.ROOT / "tests" / "kernels" / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "test_some.py", "-p", "pretend", "-v", "-c", "/dev/null", "--rootdir=."]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    environment.pop("PYTEST_XDIST_WORKER", None)  # which this test may run in
    for workers, said in (("0", "2 passed"), ("1", "1 failed, 3 passed")):  # a process of its own for the last
        found = subprocess.run([*command, "-n", workers], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert found.returncode == 1 and said in found.stdout, found.stdout + found.stderr
        assert "test_breaks broke the device: an illegal memory access" in found.stdout + found.stderr


def test_idle_time_is_what_no_kernel_covers() -> None:
    assert gpu_idle.covered([(5, 7), (0, 2), (1, 3), (6, 6.5), (7, 8)]) == 6
    assert gpu_idle.covered([]) == 0


def test_idle_time_of_a_run_of_score(capsys: pytest.CaptureFixture) -> None:
    """On a CPU there is no kernel to see; the run is a real one."""
    assert gpu_idle.main(["--device", "cpu", "--quick"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["images"] == 20 and found["seconds"] > 0 and found["idle_share"] is None
    assert gpu_results.idle(found).endswith("device idle not seen (goal: at most 5%)")
    assert "idle 7.0%, not met" in gpu_results.idle(found | {"idle_share": 0.07})


def test_idle_time_in_a_process_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(gpu_steps, "find_spec", lambda name: None)
    assert gpu_steps.idle_time(60.0)["status"] == "unavailable"
    monkeypatch.undo()
    found = gpu_steps.idle_time(120.0)  # no CUDA device here
    if not torch.cuda.is_available():
        assert found["status"] == "error" and "CUDA" in "".join(found["last_lines"])


def test_sample_rows_reach_both_ends() -> None:
    assert sample_rows(10, 4, CPU.device).tolist() == [0, 3, 6, 9]
    assert sample_rows(2, 4, CPU.device).tolist() == [0, 1]


def test_file_name() -> None:
    assert gpu_results.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
