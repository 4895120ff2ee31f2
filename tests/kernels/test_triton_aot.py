"""Every Triton kernel compiles for each target as its launcher launches it: no spill, within shared memory, wgmma.

The default run compiles each op's quick cases; ``python -m diffprune.kernels.aot`` compiles and judges all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from diffprune.kernels.aot import Compiled, main
from diffprune.kernels.triton import TARGETS


@pytest.fixture(scope="module")
def rows() -> list[Compiled]:
    """Compiled in another process: this one decorated the kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "diffprune.kernels.aot", "--quick", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.stdout, done.stderr
    names = {field.name for field in fields(Compiled)}
    return [Compiled(**{name: row[name] for name in names}) for row in json.loads(done.stdout)]


@pytest.mark.parametrize("target", TARGETS)
def test_no_faults(rows: list[Compiled], target: int) -> None:
    own = [row for row in rows if row.target == target]
    assert {row.op for row in own} >= {"linear_grad_dot", "linear_grad_sqnorm"}
    assert [(row.op, row.kernel, row.cases, fault) for row in own for fault in row.faults] == []


def test_products_of_half_precision_use_wgmma(rows: list[Compiled]) -> None:
    """By name, so that a kernel cannot lose its product unseen."""
    with_products = {(row.op, row.kernel) for row in rows if row.target == 90 and "wgmma.mma_async" in row.matrix}
    assert with_products >= {("linear_grad_dot", "_kernel"), ("linear_grad_sqnorm", "_gram_kernel")}


def test_faults_are_found(rows: list[Compiled]) -> None:
    row = next(row for row in rows if row.target == 90 and row.products)
    assert row.faults == []
    assert replace(row, spilled=8).faults == ["spills 8 bytes per thread"]
    assert replace(row, shared=227 * 1024 + 1).faults == ["wants 232449 bytes of shared memory, the device has 232448"]
    assert "no matrix instruction, expected wgmma" in replace(row, matrix={}).faults[0]
    assert "with wgmma.mma_async, mma.sync, expected" in replace(row, matrix=row.matrix | {"mma.sync": 1}).faults[0]
    assert replace(row, matrix={}, products=False).faults == []
    assert replace(row, error="out of registers").faults == ["does not compile: out of registers"]


def test_unknown_op(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["linear_grad_dots"])
    assert "got linear_grad_dots" in capsys.readouterr().err
