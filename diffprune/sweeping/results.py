"""What a sweep found: a row per cell, means and spreads over seeds, a table in Markdown, and the page."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffprune.files import atomic_path
from diffprune.reporting.sweep_page import Line, SweepMaterial, write_sweep_page
from diffprune.reporting.tables import METRICS, Metric, format_column, percent, seeds_told, told_flags
from diffprune.sweeping.cells import LEFT_OUT, Cell, list_cells, read_result
from diffprune.sweeping.differences import Difference
from diffprune.sweeping.groups import Group, against_random, grouped, shown_metrics
from diffprune.sweeping.methods import FULL
from diffprune.sweeping.settings import SweepConfig
from diffprune.sweeping.shared import Shared
from diffprune.tables import write_table

Against = dict[str, tuple[int, str, bool]]
"""By metric, of how many seeds a difference to random selection is, its text, and whether it is clear."""


def write_results(config: SweepConfig, out: Path) -> dict[str, Any]:
    """Write what the finished cells say; the same cells give the same bytes, whoever ran them and in what order."""
    found = [(cell, read_result(config, cell, out)) for cell in list_cells(config)]
    cells = [(cell, result) for cell, result in found if result is not None]
    missing = [cell.name for cell, result in found if result is None]
    groups = grouped(config, cells)
    paths = {"parquet": out / "results.parquet", "table": out / "results.md", "page": out / "sweep.html"}
    write_table(paths["parquet"], _rows(cells), {"stage": "sweep", "config": config.identity(), "missing": missing})
    write_table(out / "summary.parquet", _summary(groups), {"stage": "sweep", "missing": missing})
    with atomic_path(paths["table"]) as temporary:
        real = _real(cells, shown_metrics(groups))
        text = markdown(groups, missing, real) + (class_table(groups) if config.data.skew > 1 else "")
        temporary.write_text(text, encoding="utf-8")
    write_sweep_page(paths["page"], _material(config, out, groups, cells, missing))
    return {name: str(path) for name, path in paths.items()}


def texts(groups: list[Group], metric: Metric, *, unit: bool = True) -> list[str]:
    """Mean ± spread of each group, as text with one number of decimals."""
    means, spreads = [g.mean(metric.key) for g in groups], [g.spread(metric.key) for g in groups]
    shown = format_column([*means, *spreads], percent=metric.percent, unit=unit)
    pairs = zip(shown[: len(groups)], shown[len(groups) :], strict=True)
    return [mean if spread == "–" else f"{mean} ± {spread}" for mean, spread in pairs]


def difference_texts(differences: list[Difference], metric: Metric, *, unit: bool = True) -> list[str]:
    """Difference ± half of its interval of each, as text; shares in percentage points."""
    means, halves = [found.mean for found in differences], [found.half_width for found in differences]
    shown = format_column([*means, *halves], percent=metric.percent, unit=unit)
    pairs = zip(differences, shown[: len(means)], shown[len(means) :], strict=True)
    return [
        ("+" if found.mean > 0 else "") + mean + ("" if half == "–" else f" ± {half}") for found, mean, half in pairs
    ]


def markdown(groups: list[Group], missing: list[str], real: list[str] | None = None) -> str:
    """Per ratio a table, full data its first row, ``real`` images its last; and one of differences to random."""
    metrics = shown_metrics(groups)
    columns = {metric.key: dict(zip(map(id, groups), texts(groups, metric), strict=True)) for metric in metrics}
    differences = _against_texts(groups, metrics)
    lines = []
    full = [group for group in groups if group.method == FULL]
    for ratio in sorted({group.prune for group in groups if group.method != FULL}) or [0.0]:
        rows = full + [group for group in groups if group.method != FULL and group.prune == ratio]
        seeds = seeds_told(len(values) for group in rows for values in group.values.values() if values)
        lines += [f"### {100 * ratio:.10g}% pruned", "", f"Mean ± sample standard deviation over {seeds}.", ""]
        lines.append("| method | images | " + " | ".join(f"{m.title} {m.arrow}" for m in metrics) + " |")
        lines.append("|---" * (2 + len(metrics)) + "|")
        for group in rows:
            cells = " | ".join(columns[metric.key][id(group)] for metric in metrics)
            lines.append(f"| {group.method} | {group.training_images:,} | {cells} |")
        lines += [f"| real images | | {' | '.join(real)} |"] if real else []
        against = {method: told for (method, prune), told in differences.items() if prune == ratio}
        lines += ["", *_difference_table(against, ratio, metrics)]
    if missing:
        lines += [f"Missing, {len(missing)} cells: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _difference_table(against: dict[str, Against], ratio: float, metrics: list[Metric]) -> list[str]:
    """The lines of a table in Markdown, by method; none without random selection to compare with."""
    shown = [metric for metric in metrics if any(metric.key in told for told in against.values())]
    if not shown:
        return []
    rows = []
    for method, told in against.items():
        cells = [told.get(metric.key, (0, "–", False)) for metric in shown]
        rows.append([method, *(f"**{text}**" if is_clear else text for _, text, is_clear in cells)])
    seeds = seeds_told(seeds for told in against.values() for seeds, *_ in told.values())
    return [
        f"#### Difference to random selection at {100 * ratio:.10g}%",
        "",
        f"Mean over {seeds} of the difference to `random` with the same seed ± half of its 95% interval (Student's t). "
        "Of shares, percentage points. Bold: 0 is outside of the interval, as it is by chance once in 20 numbers where "
        "there is no difference.",
        "",
        "| method | " + " | ".join(f"{m.title} {m.arrow}" for m in shown) + " |",
        "|---" * (1 + len(shown)) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def class_table(groups: list[Group]) -> str:
    """The classes of the training images and of what the models generate: means over seeds, and the rarer half's."""
    names = sorted({name for group in groups for name in {**group.trained_on, **group.classes}}, key=int)
    rarer = sorted(names, key=lambda name: groups[0].trained_on.get(name, 0.0))[: len(names) // 2]
    lines = ["### Classes", "", f"Share of each class; the last column is that of {', '.join(sorted(rarer))}.", ""]
    lines.append("| method | pruned | images | " + " | ".join(names) + " | rarer half |")
    lines.append("|---" * (4 + len(names)) + "|")
    for group in groups:
        seeds = range(min(map(len, group.classes.values()), default=0))
        half = [math.fsum(group.classes[name][seed] for name in rarer if name in group.classes) for seed in seeds]
        spread = f" ± {percent(statistics.stdev(half))}" if len(half) > 1 else ""
        rows = [("trained on", group.trained_on, percent(math.fsum(group.trained_on.get(name, 0) for name in rarer)))]
        if half:
            made = {name: statistics.fmean(values) for name, values in group.classes.items()}
            rows.append(("generated", made, percent(statistics.fmean(half)) + spread))
        for what, shares, last in rows:
            cells = " | ".join(percent(shares.get(name, 0.0)) for name in names)
            lines.append(f"| {group.method} | {100 * group.prune:.10g}% | {what} | {cells} | {last} |")
    return "\n".join([*lines, ""])


def _material(
    config: SweepConfig, out: Path, groups: list[Group], cells: list[tuple[Cell, dict[str, Any]]], missing: list[str]
) -> SweepMaterial:
    metrics, shared = shown_metrics(groups), Shared(config, out / "shared")
    told = {metric.key: texts(groups, metric, unit=False) for metric in metrics}
    against = _against_texts(groups, metrics, unit=False)
    lines = [
        Line(
            group.method,
            group.prune,
            group.training_images,
            {name: column[place] for name, column in told.items()},
            {metric.key: group.mean(metric.key) for metric in metrics},
            {metric.key: group.spread(metric.key) for metric in metrics},
            {name: statistics.fmean(values) for name, values in group.classes.items()},
            max(map(len, group.values.values())),
            against.get((group.method, group.prune), {}),
        )
        for place, group in enumerate(groups)
    ]
    first = cells[0][1]
    columns = set().union(*(config.method(name).columns for name in config.sweep.methods))
    samples: dict[tuple[str, float], tuple[int, Path]] = {}
    for cell, _ in cells:
        folder = out / "cells" / cell.name / "samples"
        if any(folder.glob("*-000000.tar")):  # of the first seed that there is; somebody may have made room
            samples.setdefault((cell.method, cell.prune), (cell.seed, folder))
    return SweepMaterial(
        config.sweep.title or "Pruning methods compared",
        lines,
        metrics,
        _real(cells, metrics, unit=False),
        config.sweep.seeds,
        len(cells) + len(missing),
        missing,
        _common(first["setting"], config),
        told_flags((cell.name.rpartition("-s")[0], result) for cell, result in cells) + _other_baselines(cells),
        first["classes"]["reference_shares"] if first["classes"] else {},
        {folder.name: folder for folder in shared.tables(columns)[1:]},
        samples,
    )


def _other_baselines(cells: list[tuple[Cell, dict[str, Any]]]) -> list[str]:
    """A note, if memorization is not judged by the same images for all methods."""
    if all(result["setting"]["memorization_baseline"] != LEFT_OUT for _, result in cells):
        return []
    return [
        f"nearest training image and near copies are judged by {LEFT_OUT}, which differs from method to method: they "
        'compare methods only with evaluate.reference = "held-out"'
    ]


def _against_texts(
    groups: list[Group], metrics: list[Metric], *, unit: bool = True
) -> dict[tuple[str, float], Against]:
    """By method and ratio, how far each is from random selection; the numbers of a ratio have one form."""
    found = against_random(groups)
    told: dict[tuple[str, float], Against] = {place: {} for place in found}
    for ratio in {prune for _, prune in found}:
        for metric in metrics:
            pairs = {at: pair[metric.key] for at, pair in found.items() if at[1] == ratio and metric.key in pair}
            shown = difference_texts(list(pairs.values()), metric, unit=unit)
            for (at, pair), text in zip(pairs.items(), shown, strict=True):
                told[at][metric.key] = (pair.seeds, text, pair.is_clear)
    return told


def _real(cells: list[tuple[Cell, dict[str, Any]]], metrics: list[Metric], *, unit: bool = True) -> list[str] | None:
    """What real images have in each metric, as text; None where no cell says, as those of old did not."""
    real = next((result["real"] for _, result in cells if result.get("real")), None)
    if real is None:
        return None
    return [format_column([real.get(metric.key)], percent=metric.percent, unit=unit)[0] for metric in metrics]


def _common(setting: dict[str, Any], config: SweepConfig) -> dict[str, Any]:
    """What all cells have in common of a cell's setting."""
    own = ("model_sha256", "epochs", "memorization_baseline")
    seeds = {**setting["seeds"], "train": list(config.sweep.seeds), "select": list(config.sweep.seeds)}
    return {**{name: value for name, value in setting.items() if name not in own}, "seeds": seeds}


def _rows(cells: list[tuple[Cell, dict[str, Any]]]) -> pa.Table:
    """A row per cell. Nothing in it depends on when, where or beside what the cell was run."""
    results = [result for _, result in cells]
    columns: dict[str, pa.Array] = {
        "name": pa.array([cell.name for cell, _ in cells]),
        "method": pa.array([cell.method for cell, _ in cells]),
        "prune": pa.array([cell.prune for cell, _ in cells], pa.float64()),
        "seed": pa.array([cell.seed for cell, _ in cells], pa.int64()),
        "training_images": pa.array([r["training_images"] for r in results], pa.int64()),
    }
    for metric in METRICS:
        columns[metric.key] = pa.array([r["metrics"].get(metric.key) for r in results], pa.float64())
    for name, kind in (("training_classes", pa.int64()), ("generated_classes", pa.float64())):
        values = [
            r["training_classes"] if name == "training_classes" else (r["classes"] or {}).get("shares", {})
            for r in results
        ]
        columns[name] = pa.array([list(v.items()) for v in values], pa.map_(pa.string(), kind))
    settings = [r["setting"] for r in results]
    columns |= {
        "reference_split": pa.array([s["reference"]["split"] for s in settings]),
        "reference_images": pa.array([s["reference"]["count"] for s in settings], pa.int64()),
        "samples": pa.array([s["samples"] for s in settings], pa.int64()),
        "sampling_method": pa.array([s["sampling"]["method"] for s in settings]),
        "sampling_steps": pa.array([s["sampling"]["steps"] for s in settings], pa.int64()),
        "guidance": pa.array([s["sampling"]["guidance"] for s in settings], pa.float64()),
        "encoder": pa.array([s["encoder"]["model"] for s in settings]),
        "encoder_sha256": pa.array([s["encoder"].get("model_sha256") for s in settings], pa.string()),
        "encoder_dimensions": pa.array([s["encoder"]["dimensions"] for s in settings], pa.int64()),
        "vqvae_sha256": pa.array([s["vqvae_sha256"] for s in settings], pa.string()),
        "model_sha256": pa.array([s["model_sha256"] for s in settings], pa.string()),
        "sampling_seed": pa.array([s["seeds"]["sample"] for s in settings], pa.int64()),
        "flags": pa.array([r["flags"] for r in results], pa.list_(pa.string())),
    }
    return pa.table(columns)


def _summary(groups: list[Group]) -> pa.Table:
    """A row per method, ratio and metric; the last columns are about the difference to random selection."""
    rows, against = [], against_random(groups)
    for group in groups:
        for metric in shown_metrics(groups):
            pair = against.get((group.method, group.prune), {}).get(metric.key)
            row = {
                "method": group.method,
                "prune": group.prune,
                "training_images": group.training_images,
                "metric": metric.key,
                "seeds": len(group.values[metric.key]),
                "mean": group.mean(metric.key),
                "spread": group.spread(metric.key),
                "minus_random": pair and pair.mean,
                "minus_random_error": pair and pair.error,
                "minus_random_interval": pair and pair.half_width,
                "minus_random_seeds": pair.seeds if pair else 0,
            }
            rows.append(row)
    kinds = {"method": pa.string(), "metric": pa.string()}
    kinds |= {name: pa.int64() for name in ("training_images", "seeds", "minus_random_seeds")}
    names = list(rows[0])
    return pa.table({name: pa.array([row[name] for row in rows], kinds.get(name, pa.float64())) for name in names})
