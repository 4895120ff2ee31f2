"""What a sweep found: a row per cell, means and spreads over seeds, a table in Markdown, and the page."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffprune.files import atomic_path
from diffprune.reporting.sweep_page import Line, SweepMaterial, write_sweep_page
from diffprune.reporting.tables import METRICS, Metric, format_column, percent, seeds_told
from diffprune.sweeping.cells import Cell, list_cells, read_result
from diffprune.sweeping.differences import Difference, paired_difference
from diffprune.sweeping.methods import FULL, RANDOM
from diffprune.sweeping.settings import SweepConfig
from diffprune.sweeping.shared import Shared
from diffprune.tables import write_table


@dataclass(frozen=True)
class Group:
    """The cells of one method and ratio."""

    method: str
    prune: float
    training_images: int
    values: dict[str, dict[int, float]]
    """Of each metric, by seed."""
    classes: dict[str, list[float]]
    """Of each class, the share of the generated images, per seed."""
    trained_on: dict[str, float]
    """Of each class, the share of the training images, mean over seeds."""

    def mean(self, metric: str) -> float | None:
        """Over seeds; None where no cell has the metric."""
        values = self.values.get(metric)
        return statistics.fmean(values.values()) if values else None

    def spread(self, metric: str) -> float | None:
        """Sample standard deviation over seeds; None with fewer than two."""
        values = self.values.get(metric, {})
        return statistics.stdev(values.values()) if len(values) > 1 else None


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
        text = markdown(groups, missing) + (class_table(groups) if config.data.skew > 1 else "")
        temporary.write_text(text, encoding="utf-8")
    write_sweep_page(paths["page"], _material(config, out, groups, cells, missing))
    return {name: str(path) for name, path in paths.items()}


def grouped(config: SweepConfig, cells: list[tuple[Cell, dict[str, Any]]]) -> list[Group]:
    """Full data first, then the methods in order of the config, each by rising ratio."""
    groups = []
    grid = config.sweep
    for method, ratio in [(FULL, 0.0), *((method, ratio) for method in grid.methods for ratio in sorted(grid.prune))]:
        by_seed = {cell.seed: result for cell, result in cells if (cell.method, cell.prune) == (method, ratio)}
        if not by_seed:
            continue
        own = list(by_seed.values())
        measured = {seed: result["metrics"] for seed, result in by_seed.items()}
        values = {
            m.key: {seed: found[m.key] for seed, found in measured.items() if found.get(m.key) is not None}
            for m in METRICS
        }
        shares = [r["classes"]["shares"] for r in own if r["classes"]]
        classes = {name: [share[name] for share in shares] for name in (shares[0] if shares else {})}
        counts = [result["training_classes"] for result in own]
        trained_on = {
            name: statistics.fmean(count.get(name, 0) / sum(count.values()) for count in counts)
            for name in sorted({name for count in counts for name in count}, key=int)
        }
        groups.append(Group(method, ratio, own[0]["training_images"], values, classes, trained_on))
    return groups


def shown_metrics(groups: list[Group]) -> list[Metric]:
    """The metrics that some cell has."""
    return [metric for metric in METRICS if any(group.values[metric.key] for group in groups)]


def texts(groups: list[Group], metric: Metric) -> list[str]:
    """Mean ± spread of each group, as text with one number of decimals."""
    means, spreads = [g.mean(metric.key) for g in groups], [g.spread(metric.key) for g in groups]
    shown = format_column([*means, *spreads], percent=metric.percent)
    pairs = zip(shown[: len(groups)], shown[len(groups) :], strict=True)
    return [mean if spread == "–" else f"{mean} ± {spread}" for mean, spread in pairs]


def against_random(groups: list[Group]) -> dict[tuple[str, float], dict[str, Difference]]:
    """By method and ratio, of each metric: how far it is from random selection at the same ratio and seeds."""
    random = {group.prune: group for group in groups if group.method == RANDOM}
    found: dict[tuple[str, float], dict[str, Difference]] = {}
    for group in groups:
        if group.method != RANDOM and group.prune in random:
            pairs = {
                name: paired_difference(values, random[group.prune].values[name])
                for name, values in group.values.items()
            }
            found[group.method, group.prune] = {name: pair for name, pair in pairs.items() if pair is not None}
    return found


def difference_texts(differences: list[Difference | None], metric: Metric) -> list[str]:
    """Difference ± half of its interval of each, as text; shares in percentage points."""
    means = [found and found.mean for found in differences]
    halves = [found and found.half_width for found in differences]
    shown = format_column([*means, *halves], percent=metric.percent)
    pairs = zip(differences, shown[: len(means)], shown[len(means) :], strict=True)
    return [
        ("+" if found and found.mean > 0 else "") + mean + ("" if half == "–" else f" ± {half}")
        for found, mean, half in pairs
    ]


def markdown(groups: list[Group], missing: list[str]) -> str:
    """Per ratio a table, full data its first row, and one of how far the methods are from random selection."""
    metrics = shown_metrics(groups)
    columns = {metric.key: dict(zip(map(id, groups), texts(groups, metric), strict=True)) for metric in metrics}
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
        lines += ["", *_difference_table(groups, ratio, metrics)]
    if missing:
        lines += [f"Missing, {len(missing)} cells: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _difference_table(groups: list[Group], ratio: float, metrics: list[Metric]) -> list[str]:
    """The lines of a table in Markdown, none without random selection to compare with."""
    found = {method: pairs for (method, prune), pairs in against_random(groups).items() if prune == ratio}
    shown = [metric for metric in metrics if any(metric.key in pairs for pairs in found.values())]
    if not shown:
        return []
    columns = []
    for metric in shown:
        differences = [pairs.get(metric.key) for pairs in found.values()]
        told = zip(differences, difference_texts(differences, metric), strict=True)
        columns.append([f"**{text}**" if one and one.is_clear else text for one, text in told])
    seeds = seeds_told(pair.seeds for pairs in found.values() for pair in pairs.values())
    return [
        f"#### Difference to random selection at {100 * ratio:.10g}%",
        "",
        f"Mean over {seeds} of the difference to `random` with the same seed ± half of its 95% interval (Student's t). "
        "Of shares, percentage points. Bold: 0 is outside of the interval, as it is by chance once in 20 numbers where "
        "there is no difference.",
        "",
        "| method | " + " | ".join(f"{m.title} {m.arrow}" for m in shown) + " |",
        "|---" * (1 + len(shown)) + "|",
        *("| " + " | ".join(row) + " |" for row in zip(found, *columns, strict=True)),
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
    told = {metric.key: texts(groups, metric) for metric in metrics}
    lines = [
        Line(
            group.method,
            group.prune,
            group.training_images,
            {name: column[place] for name, column in told.items()},
            {metric.key: group.mean(metric.key) for metric in metrics},
            {metric.key: group.spread(metric.key) for metric in metrics},
            {name: statistics.fmean(values) for name, values in group.classes.items()},
        )
        for place, group in enumerate(groups)
    ]
    first = cells[0][1]
    columns = set().union(*(config.method(name).columns for name in config.sweep.methods))
    samples: dict[tuple[str, float], Path] = {}
    for cell, _ in cells:
        folder = out / "cells" / cell.name / "samples"
        if any(folder.glob("*-000000.tar")):  # of the first seed that there is; somebody may have made room
            samples.setdefault((cell.method, cell.prune), folder)
    return SweepMaterial(
        config.sweep.title or "Pruning methods compared",
        lines,
        metrics,
        config.sweep.seeds,
        len(cells) + len(missing),
        missing,
        _common(first["setting"], config),
        sorted({flag for _, result in cells for flag in result["flags"]}),
        first["classes"]["reference_shares"] if first["classes"] else {},
        {folder.name: folder for folder in shared.tables(columns)[1:]},
        samples,
    )


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
