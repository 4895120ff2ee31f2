"""What a run leaves: shares of the ceilings, goals met or not, the JSON and its tables."""

from __future__ import annotations

import re
from math import inf, log
from pathlib import Path
from typing import Any

from diffprune.files import read_json
from diffprune.kernels import report
from diffprune.kernels.dispatch import orders

RESULTS = Path(__file__).parent / "results"
NOT_RUN = "not yet run on a GPU"
MOST_IDLE = 0.05


def file_name(device: str) -> str:
    """``<device>.json``, of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def judge(records: list[dict[str, Any]], ceilings: dict[str, float]) -> None:
    """Add to each timed record its rates and shares, and to each goal its ``value`` and ``met``.

    ``ceilings``: "copy" in bytes per second, "matmul_float16" and "matmul_bfloat16" in operations per second; what was
    not measured is missing, and the shares of it too. ``met`` is None where the goal could not be judged.
    """
    timed = [r for r in records if r["status"] == "ok" and r.get("median_s")]
    for r in timed:
        seconds, copy = r["median_s"], ceilings.get("copy")
        rate = ceilings.get("matmul_bfloat16" if r["dtype"] == "bfloat16" else "matmul_float16")
        r["bytes_per_s"], r["operations_per_s"] = r["bytes"] / seconds, r["operations"] / seconds
        if images := r["shape"].get("images"):
            r["images_per_s"] = images / seconds
        if copy:
            r["share_of_copy"] = r["bytes_per_s"] / copy
        if rate and r["operations"]:
            r["share_of_matmul"] = r["operations_per_s"] / rate
        if copy and (rate or not r["operations"]):
            r["bound_s"] = max(r["bytes"] / copy, r["operations"] / rate if r["operations"] else 0.0)
            r["share_of_bound"] = r["bound_s"] / seconds
    for r in records:
        for goal in r.get("goals", []):
            goal["value"] = _value(goal, r, timed) if r in timed else None
            goal["met"] = None if goal["value"] is None else _met(goal)


def _met(goal: dict[str, Any]) -> bool:
    return goal["value"] <= goal["factor"] if goal["kind"] == "part" else goal["value"] >= goal["factor"]


def _value(goal: dict[str, Any], r: dict[str, Any], timed: list[dict[str, Any]]) -> float | None:
    if goal["kind"] in ("copy", "matmul", "bound"):
        return r.get(f"share_of_{goal['kind']}")
    if goal["kind"] == "part":
        whole = [
            o
            for o in timed
            if (o["op"], o["label"], o["implementation"]) == (goal["against"][0], r["label"], r["implementation"])
        ]
        return r["median_s"] / whole[0]["median_s"] if whole else None
    same = [o for o in timed if (o["op"], o["label"]) == (r["op"], r["label"]) and not o["ours"]]
    rivals = [o["median_s"] for o in same if o["implementation"].startswith(tuple(goal["against"]))]
    return min(rivals) / r["median_s"] if rivals else None


def failed(result: dict[str, Any]) -> bool:
    """Whether a kernel test failed (or not all ran), a result of ours was wrong, or an op could not be imported."""
    wrong = any(r["ours"] and r["status"] == "wrong" for r in result["records"])
    return wrong or bool(result.get("errors")) or result.get("tests", {}).get("status") in ("failed", "error")


def confirmed(result: dict[str, Any]) -> str:
    """What this run confirms, as ``dispatch.CONFIRMED`` takes it; "" where tests did not pass or did not run.

    Of each op the implementation that was right in all cases, and in none slower than other code that computes the
    same; of several such the faster. Its backward, which the cases time too, goes with it.
    """
    if result.get("tests", {}).get("status") != "ok" or failed(result):
        return ""
    found = []
    for op in sorted(report().keys() - orders().keys()):  # of the others "auto" takes PyTorch's own first
        own = [r for r in result["records"] if r["op"] == op]
        paces = {name: _pace(own, name) for name in dict.fromkeys(r["implementation"] for r in own if r["ours"])}
        best = min(paces, key=paces.__getitem__, default="")
        if best and paces[best] < inf:
            both = (op, f"{op}_backward", f"{op}_grad")
            found += [f"{best}:{one}" for one in both if best in report().get(one, {})]
    return ",".join(found)


def _pace(records: list[dict[str, Any]], name: str) -> float:
    """Mean logarithm of an implementation's seconds; infinite if in some case it was not right, or not the faster."""
    logarithms = []
    for r in records:
        if r["implementation"] == name:
            same = [o for o in records if o["label"] == r["label"] and not o["ours"] and "error" in o]
            rivals = [o["median_s"] for o in same if o["status"] == "ok"]
            if r["status"] != "ok" or r["median_s"] > min(rivals, default=inf):
                return inf
            logarithms.append(log(r["median_s"]))
    return sum(logarithms) / len(logarithms)


def short_table(result: dict[str, Any]) -> str:
    """One line per record, for a terminal."""
    lines = []
    for r in result["records"]:
        head = f"{r['op'][:22]:22} {r['label'][:36]:36} {r['implementation'][:28]:28}"
        lines.append(f"{head} {_time(r):>10} {_rate(r):>13} {_percent(r.get('share_of_bound')):>5}  {_goals(r)}")
    return "\n".join(lines)


def idle(found: dict[str, Any]) -> str:
    """Of the step "idle", with the goal."""
    share, most = found["idle_share"], MOST_IDLE
    judged = "not seen" if share is None else f"{share:.1%}, {'met' if share <= most else 'not met'}"
    return f"`score` with {found['model']} from files to tables: device idle {judged} (goal: at most {most:.0%})"


def markdown(folder: Path, planned: list[dict[str, Any]]) -> str:
    """Tables of all results in ``folder``, one per device; ``planned`` rows that no device has say so."""
    results = [read_json(path) for path in sorted(folder.glob("*.json"))] if folder.exists() else []
    parts = []
    for result in results:
        tests, ceilings = result.get("tests", {}), result.get("ceilings", {})
        versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
        facts = [f"copy {ceilings['copy'] / 1e12:.2f} TB/s"] if "copy" in ceilings else []
        facts += [
            f"{name.removeprefix('matmul_')} matmul {rate / 1e12:.0f} TFLOP/s"
            for name, rate in sorted(ceilings.items())
            if name.startswith("matmul_")
        ]
        counts = ", ".join(f"{tests[k]} {k}" for k in ("passed", "failed", "skipped") if k in tests)
        facts.append(f"kernel tests: {counts or tests.get('status', 'not run')}")
        facts += [idle(result["idle"])] if "idle_share" in result.get("idle", {}) else []
        rows = result["records"] + _missing(planned, result["records"])
        parts.append(f"### {result['device']}\n\n{versions}. {'; '.join(facts)}.\n\n{_rows(rows)}")
    if not results:
        parts.append(_rows(planned))
    return "\n\n".join(parts) + "\n"


def _missing(planned: list[dict[str, Any]], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    have = {(r["op"], r["label"], r["implementation"]) for r in records}
    return [r for r in planned if (r["op"], r["label"], r["implementation"]) not in have]


def _rows(records: list[dict[str, Any]]) -> str:
    lines = ["| op | case | implementation | median | quartiles, ms | rate | of the bound | goal |"]
    lines.append("|---|---|---|--:|--:|--:|--:|---|")
    for r in records:
        spread = f"{r['lower_s'] * 1e3:.3g} to {r['upper_s'] * 1e3:.3g}" if r.get("median_s") else ""
        size = " ".join(f"{k}={v}" for k, v in r["shape"].items())
        cells = (f"`{r['op']}`", f"{r['label']}, {size}", r["implementation"], _time(r), spread, _rate(r),
                 _percent(r.get("share_of_bound")), _goals(r))  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _time(r: dict[str, Any]) -> str:
    if r["status"] == "ok":
        return f"{r['median_s'] * 1e3:.3g} ms"
    return NOT_RUN if r["status"] == "planned" else r["status"]


def _rate(r: dict[str, Any]) -> str:
    if "bytes_per_s" not in r:
        return ""
    if "images_per_s" in r:
        peak = f", {r['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in r else ""
        return f"{r['images_per_s']:,.0f} images/s, MFU {_percent(r.get('share_of_matmul'))}{peak}"
    return f"{r['operations_per_s'] / 1e12:.3g} TFLOP/s" if r["operations"] else f"{r['bytes_per_s'] / 1e9:.4g} GB/s"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _goals(r: dict[str, Any]) -> str:
    def one(goal: dict[str, Any]) -> str:
        value = goal.get("value")
        if value is None:
            return f"{goal['text']}: {NOT_RUN if r['status'] == 'planned' else 'not measured'}"
        return f"{goal['text']}: {value:.2f}, {'met' if goal['met'] else 'not met'}"

    return "; ".join(one(goal) for goal in r.get("goals", []))
