"""Every Triton kernel compiles for each target as its launcher does: no spill, within shared memory, wgmma in flight.

The default run compiles each op's quick cases, with ``DIFFPRUNE_AOT=all`` this one compiles and judges all, as
``python -m diffprune.kernels.aot`` does, which prints the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch

from diffprune.kernels import triton
from diffprune.kernels.aot import Compiled, main, markdown, ops
from diffprune.kernels.triton import TARGETS


@pytest.fixture(scope="module")
def rows() -> list[Compiled]:
    """Compiled in another process: this one decorated the kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "diffprune.kernels.aot", "--json"]
    command += [] if os.environ.get("DIFFPRUNE_AOT") == "all" else ["--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.stdout, done.stderr
    names = {field.name for field in fields(Compiled)}
    return [Compiled(**{name: row[name] for name in names}) for row in json.loads(done.stdout)]


@pytest.mark.parametrize("target", TARGETS)
def test_no_faults(rows: list[Compiled], target: int) -> None:
    own = [row for row in rows if row.target == target]
    assert {row.op for row in own} == set(ops())
    assert [(row.op, row.kernel, row.cases, fault) for row in own for fault in row.faults] == []


def test_products_of_half_precision_use_wgmma(rows: list[Compiled]) -> None:
    """By name, so that a kernel cannot lose its product unseen."""
    with_products = {(row.op, row.kernel) for row in rows if row.target == 90 and "wgmma.mma_async" in row.matrix}
    assert with_products >= {
        ("attention", "_kernel"),
        ("attention_backward", "_key_value_kernel"),
        ("attention_backward", "_query_kernel"),
        ("kmeans_assign", "_search_kernel"),
        ("linear_grad_dot", "_kernel"),
        ("linear_grad_sqnorm", "_direct_kernel"),
        ("linear_grad_sqnorm", "_gram_kernel"),
        ("linear_grad_sqnorm_dot", "_direct_kernel"),
        ("pairwise_topk", "_search_kernel"),
    }


def test_every_op_has_cases_of_the_sizes_that_matter() -> None:
    """DiT-S/2's and DiT-XL/2's layers, heads and widths, and k-means over embeddings of 384, 768 and 1024."""
    modules = {m.name: import_module(f"{triton.__name__}.{m.name}") for m in iter_modules(triton.__path__)}
    assert ops() == sorted(name for name, module in modules.items() if hasattr(module, "run"))
    cases = {op: list(modules[op].aot_cases()) for op in ops()}
    for op, own in cases.items():
        assert 1 <= sum(case.quick for case in own) <= 3, op
        assert len({case.label for case in own}) == len(own), op
        assert all(x.device.type == "meta" for case in own for x in case.args if isinstance(x, torch.Tensor)), op
    widths = {"S/2": 384, "XL/2": 1152}
    for op in ("linear_grad_dot", "linear_grad_sqnorm"):
        shapes = {(case.args[0].shape[2], case.args[1].shape[2]) for case in cases[op]}
        for width in widths.values():
            blocks = {(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width), (width, 6 * width)}
            assert shapes >= blocks | {(16, width), (width, 32)}
    for op in ("kmeans_assign", "kmeans_update", "kmeans_update_delta"):
        assert {case.args[0].shape[1] for case in cases[op]} >= {384, 768, 1024}
    for op in ("attention", "attention_backward"):
        assert {case.args[1].shape[3] for case in cases[op]} >= {32, 64, 72, 96, 128}
    for op in (name for name in ops() if name.startswith(("adaln", "gated"))):
        assert {case.args[0].shape[2] for case in cases[op]} == set(widths.values())


def test_faults_are_found(rows: list[Compiled]) -> None:
    row = next(row for row in rows if row.target == 90 and row.products)
    assert row.faults == []
    assert replace(row, spilled=8).faults == ["spills 8 bytes per thread"]
    assert replace(row, shared=227 * 1024 + 1).faults == ["wants 232449 bytes of shared memory, the device has 232448"]
    assert "no matrix instruction, expected wgmma" in replace(row, matrix={}).faults[0]
    assert "with wgmma.mma_async, mma.sync, expected" in replace(row, matrix=row.matrix | {"mma.sync": 1}).faults[0]
    assert replace(row, matrix={}, products=False).faults == []
    assert replace(row, matrix={"mma.sync tf32": 1}, products=False).faults == ["multiplies float32 rounded to TF32"]
    assert replace(row, losses=("wgmma are serialized",)).faults == ["ptxas: wgmma are serialized"]
    assert replace(row, error="out of registers").faults == ["does not compile: out of registers"]


def test_what_ptxas_loses_is_found(tmp_path: Path) -> None:
    """A product that may be left out before the next one adds to it."""
    source = tmp_path / "slow.py"
    source.write_text(SERIALIZED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(source)], env=environment, capture_output=True, text=True, timeout=300)
    assert "wgmma.mma_async instructions are serialized" in done.stdout, done.stderr


SERIALIZED = """
import torch, triton, triton.language as tl
from diffprune.kernels import aot
from diffprune.kernels.triton import TARGETS, Case

@triton.jit
def kernel(x_ptr, y_ptr, width):
    r = tl.arange(0, 64)
    places = x_ptr + r[:, None] * width + r[None, :]
    tile = tl.zeros((64, 64), dtype=tl.float32)
    if tl.load(y_ptr) > 0:
        for k in range(0, width, 64):
            x = tl.load(places + k)
            tile = tl.dot(x, x.T, tile)
    else:
        for k in range(0, width, 64):
            tile = tl.dot(tl.load(places + k), tl.load(places + k + 64), tile)
    tl.store(y_ptr + r[:, None] * 64 + r[None, :], tile)

class Module:
    def run(x, y):
        kernel[(1,)](x, y, 1024)

case = Case("", (torch.empty(64, 1024, dtype=torch.float16, device="meta"), torch.empty(64, 64, device="meta")))
[(launched, compiled)] = aot._launched(Module, case, TARGETS[90])
print(aot._describe("slow", 90, launched, compiled, []).faults)
"""


def test_markdown_has_a_line_per_configuration(rows: list[Compiled]) -> None:
    """What differs between targets is in their columns; what a kernel spills, in bold."""
    row = next(row for row in rows if row.target == 90 and row.products)
    row = replace(
        row, constants={"SIDE": "64", "TAG": "1.5", "BIAS": "True"}, registers=99, shared=2048, matrix={"x.y": 3}
    )
    other = replace(row, target=80, registers=50, spilled=8, cases=(*row.cases, "another"))
    wide = replace(row, constants=row.constants | {"SIDE": "128", "TAG": "2.5"}, shared=0)
    lines = markdown([row, other, wide]).splitlines()
    assert lines[0] == "| op, kernel | configuration | cases | sm_80 | sm_90 |"
    name = f"| `{row.op}`, `{row.kernel}` |"
    assert lines[2] == f"{name} SIDE=64 | 2 | 50 regs, 2 KiB, 3 x, **spills 8 bytes** | 99 regs, 2 KiB, 3 x |"
    assert lines[3] == f"{name} SIDE=128 | 1 |  | 99 regs, 0 KiB, 3 x |"


def test_unknown_op(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["linear_grad_dots"])
    assert "got linear_grad_dots" in capsys.readouterr().err
