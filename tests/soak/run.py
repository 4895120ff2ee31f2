"""The long tests, one after the other, and one table: what was tried, survived, lost. `make soak`.

    python -m tests.soak.run --out runs/soak

Writes ``soak.json`` and ``soak.md`` there. Exits 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEEDED = {"ray_nodes": "ray", "fuzz_atheris": "atheris", "s3_faults": "s3fs"}
Row = tuple[str, int, int, int]  # what, tried, survived, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--kills", type=int, default=50, help="in each stage")
    parser.add_argument("--node-kills", type=int, default=12, help="of nodes of a Ray cluster")
    parser.add_argument("--mutations", type=int, default=100_000, help="of tars")
    parser.add_argument("--s3-seconds", type=int, default=180, help="of faults in an S3-compatible server")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    failed: list[str] = []
    began = time.monotonic()
    for name, options, read in (
        ("kills", ["--kills", str(arguments.kills)], rows_of_kills),
        ("ray_nodes", ["--kills", str(arguments.node_kills)], rows_as_told),
        ("fuzz_shards", ["--count", str(arguments.mutations)], rows_of_mutations),
        ("fuzz_atheris", ["--runs", str(arguments.mutations)], rows_as_told),
        ("s3_faults", ["--seconds", str(arguments.s3_seconds)], rows_as_told),
    ):
        module = f"tests.soak.{name}"
        needed = NEEDED.get(name)
        if needed and importlib.util.find_spec(needed) is None:
            print(f"{name}: needs {needed}, left out", flush=True)
            continue
        told = arguments.out / f"{name}.json"
        told.unlink(missing_ok=True)
        print(f"--- {name} {' '.join(options)}", flush=True)
        code = subprocess.run(
            [sys.executable, "-m", module, *options, "--json", str(told)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        ).returncode
        if code or not told.is_file():
            failed.append(f"{name}: exit code {code}")
        if told.is_file():
            rows += read(json.loads(told.read_text()))
    minutes = (time.monotonic() - began) / 60
    about = f"{date.today()}, {machine()}, {minutes:.0f} minutes"
    result = {"about": about, "minutes": minutes, "rows": rows, "failed": failed}
    (arguments.out / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / "soak.md").write_text(markdown(rows, about))
    print(f"\n{markdown(rows, about)}")
    lost = sum(row[3] for row in rows)
    print("\n".join(failed))
    sys.exit(bool(lost or failed))


def rows_of_kills(told: dict[str, Any]) -> list[Row]:
    rows = []
    for name, count in told["stages"].items():
        for victim, tried in (("driver", count["drivers"]), ("worker", count["workers"])):
            if tried:
                lost = len(count["lost"])
                rows.append((f"`{name}`, a {victim} killed", tried, max(0, tried - lost), lost))
    return rows


def rows_of_mutations(told: dict[str, Any]) -> list[Row]:
    return [(f"mutated tars: {name}", count, count, 0) for name, count in sorted(told["outcomes"].items())]


def rows_as_told(told: dict[str, Any]) -> list[Row]:
    return [(row["what"], row["tried"], row["survived"], row["lost"]) for row in told["rows"]]


def markdown(rows: list[Row], about: str) -> str:
    lines = [f"{about}.", "", "| | tried | survived | lost |", "|---|---:|---:|---:|"]
    lines += [f"| {what} | {tried:,} | {survived:,} | {lost:,} |" for what, tried, survived, lost in rows]
    tried, survived, lost = (sum(row[column] for row in rows) for column in (1, 2, 3))
    return "\n".join([*lines, f"| **all** | **{tried:,}** | **{survived:,}** | **{lost:,}** |"]) + "\n"


def machine() -> str:
    """What it ran on, without its name."""
    model = "unknown CPU"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{platform.system()}, {os.cpu_count()} cores of {model}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
