"""The page of a sweep and its pictures: tables with spreads, metrics over the ratio, one noise through all models."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffprune._version import __version__
from diffprune.files import atomic_path
from diffprune.generation import sample_key
from diffprune.reporting import sections, tables
from diffprune.reporting.build import render
from diffprune.reporting.images import data_uri, thumbnails
from diffprune.reporting.inputs import read_scores
from diffprune.reporting.palette import Palette
from diffprune.reporting.ratio_figures import (
    DASHES,
    INK,
    Panel,
    RatioLine,
    light_color,
    panel_svg,
    panels_png,
    save_png,
)

STRIP_IMAGES = 20
PNG_METRICS = (
    "frechet_distance",
    "precision",
    "recall",
    "vendi_score",
    "memorization_ratio",
    "memorized_share",
)


@dataclass(frozen=True)
class Line:
    """A method at one ratio, or full data: its texts by metric, and means and spreads (None where there is none).

    ``against``: by metric, of how many seeds the difference to random selection is, its text, and whether it is clear.
    """

    method: str
    prune: float
    training_images: int
    texts: dict[str, str]
    means: dict[str, float | None]
    spreads: dict[str, float | None]
    classes: dict[str, float]  # mean share of each class among the generated images
    seeds: int
    against: dict[str, tuple[int, str, bool]] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return self.prune == 0


@dataclass(frozen=True)
class SweepMaterial:
    """Everything that the page of a sweep is made from."""

    title: str
    lines: Sequence[Line]
    metrics: Sequence[tables.Metric]
    real: Sequence[str] | None  # what real images have in each metric
    seeds: Sequence[int]
    cells: int
    missing: Sequence[str]
    setting: dict[str, Any]
    flags: Sequence[str]
    reference_classes: dict[str, float]
    scores: dict[str, Path] = field(default_factory=dict)  # folders of tables
    samples: dict[tuple[str, float], tuple[int, Path]] = field(default_factory=dict)  # one seed's, and where they are


def write_sweep_page(path: Path, material: SweepMaterial) -> None:
    """Write one HTML file that needs nothing else, and beside it ``metrics.png`` and ``samples-<percent>.png``."""
    look = _looks([line.method for line in material.lines if not line.is_full])
    ratios = sorted({line.prune for line in material.lines if not line.is_full})
    full = next((line for line in material.lines if line.is_full), None)
    panels = {metric.key: _panel(material, metric, look, full) for metric in material.metrics} if ratios else {}
    strips = {key: _strip(shards) for key, (_, shards) in material.samples.items()}
    page = render(
        "sweep.html.j2",
        version=__version__,
        m=material,
        seeds=tables.seeds_told(line.seeds for line in material.lines),
        parts=tables.column_parts(material.metrics),
        ratios=[_ratio(material, ratio, full, strips, look) for ratio in ratios],
        legend=[{"name": name, **one} for name, one in look.items()],
        panels=[{"metric": m, "figure": panel_svg(panels[m.key], 340)} for m in material.metrics if m.key in panels],
        agreement=_agreement(material.scores),
        facts=_facts(material, ratios),
        settings=tables.flatten(material.setting),
        versions=[("diffprune", __version__), ("Python", platform.python_version())]
        + [(name, version(name)) for name in ("torch", "numpy", "pyarrow", "matplotlib")],
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    chosen = [panels[key] for key in PNG_METRICS if key in panels]
    if chosen:
        panels_png(path.with_name("metrics.png"), chosen, f"{material.title}: mean and standard deviation over seeds")
    for ratio in ratios:
        rows = _rows_of(material, ratio, full)
        _samples_png(path.with_name(f"samples-{100 * ratio:.10g}.png"), rows, strips, material.title)


def _looks(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour per family of methods (grand-high and grand-low are one), a dash pattern for each of a colour."""
    families: dict[str, list[str]] = {}
    for name in dict.fromkeys(methods):
        family = "cluster-balanced" if name.startswith("cluster-balanced") else name.split("-")[0]
        families.setdefault(family, []).append(name)
    palette = Palette(families, {}, neutral=["random"])
    dashes: dict[str, Iterator[tuple[float, ...]]] = {}  # of a colour: more families than colours share them
    return {
        name: {"color": palette(family), "dash": next(dashes.setdefault(palette(family), cycle(DASHES)))}
        for family, members in families.items()
        for name in members
    }


def _panel(m: SweepMaterial, metric: tables.Metric, look: dict[str, dict[str, Any]], full: Line | None) -> Panel:
    lines = []
    for method, one in look.items():
        own = [line for line in m.lines if line.method == method and line.means[metric.key] is not None]
        if own:
            spreads = [np.nan if line.spreads[metric.key] is None else line.spreads[metric.key] for line in own]
            lines.append(
                RatioLine(
                    method,
                    one["color"],
                    one["dash"],
                    [line.prune for line in own],
                    [line.means[metric.key] for line in own],
                    spreads,
                )
            )
    whole = None
    if full is not None and full.means[metric.key] is not None:
        spread = full.spreads[metric.key]
        whole = (full.means[metric.key], np.nan if spread is None else spread)
    return Panel(metric.title, metric.percent, lines, whole)


def _rows_of(m: SweepMaterial, ratio: float, full: Line | None) -> list[Line]:
    return ([full] if full else []) + [line for line in m.lines if not line.is_full and line.prune == ratio]


def _ratio(
    m: SweepMaterial,
    ratio: float,
    full: Line | None,
    strips: dict[tuple[str, float], np.ndarray],
    look: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """What the page says of one ratio."""
    lines = _rows_of(m, ratio, full)
    pruned = [line for line in lines if not line.is_full]
    best = {}
    for metric in m.metrics:
        choose = {"low": min, "high": max}.get(metric.better)
        values = [line.means[metric.key] for line in pruned if line.means[metric.key] is not None]
        best[metric.key] = choose(values) if choose and len(values) > 1 else None
    rows = []
    for line in lines:
        cells = []
        for metric in m.metrics:
            target = None if line.is_full else best[metric.key]
            is_best = target is not None and line.means[metric.key] == target
            cells.append({**_stacked(line.texts[metric.key]), "mark": "best" if is_best else ""})
        shares = [tables.heat_cell(line.classes.get(c, 0.0), share) for c, share in m.reference_classes.items()]
        strip = strips.get((line.method, line.prune))
        rows.append(
            {
                "name": "full data" if line.is_full else line.method,
                "full": line.is_full,
                "color": INK if line.is_full else look[line.method]["color"],
                "images": f"{line.training_images:,}",
                "cells": cells,
                "classes": shares if line.classes else [],
                "strip": None if strip is None else data_uri(strip),
                "strip_seed": None if strip is None else m.samples[line.method, line.prune][0],
            }
        )
    against = [pair for line in pruned for pair in line.against.values()]
    return {
        "percent": f"{100 * ratio:.10g}",
        "rows": rows,
        "seeds": tables.seeds_told(line.seeds for line in lines),
        "strip_seeds": sorted({row["strip_seed"] for row in rows if row["strip"]}),
        "against": [_against(m, line, look[line.method]["color"]) for line in pruned if line.against],
        "against_seeds": tables.seeds_told(seeds for seeds, *_ in against) if against else "",
        "one_seed": any(seeds == 1 for seeds, *_ in against),
    }


def _against(m: SweepMaterial, line: Line, color: str) -> dict[str, Any]:
    """The row of a method in the table of differences to random selection."""
    cells = []
    for metric in m.metrics:
        _, text, is_clear = line.against.get(metric.key, (0, "–", False))
        cells.append({**_stacked(text), "mark": "0 is outside" if is_clear else ""})
    return {"name": line.method, "color": color, "cells": cells}


def _stacked(text: str) -> dict[str, str]:
    """A number and what follows its ±, which a narrow column has under it."""
    mean, _, spread = text.partition(" ± ")
    return {"text": mean, "spread": spread}


def _strip(shards: Path) -> np.ndarray:
    """The first generated images side by side: uint8 [H, N (W + 2), 3]. The i-th of every model has the same noise."""
    keys = [sample_key(index) for index in range(STRIP_IMAGES)]
    found = [image for image in thumbnails(shards, keys).values() if image is not None]
    gap = np.full((found[0].shape[0], 2, 3), 64, np.uint8)
    return np.concatenate([part for image in found for part in (image, gap)][:-1], axis=1)


def _samples_png(path: Path, rows: Sequence[Line], strips: dict[tuple[str, float], np.ndarray], title: str) -> None:
    shown = [line for line in rows if (line.method, line.prune) in strips]
    if not shown:
        return
    parts = [strips[line.method, line.prune] for line in shown]
    height, width = parts[0].shape[:2]
    gap = np.full((2, width, 3), 64, np.uint8)
    sheet = np.concatenate([part for strip in parts for part in (strip, gap)][:-1])
    scale = 9.0 / width
    figure = Figure(figsize=(9 + 1.9, scale * sheet.shape[0] + 0.4), dpi=100, facecolor="white")
    box = (1.8 / 10.9, 0.02, 9.0 / 10.9, scale * sheet.shape[0] / (scale * sheet.shape[0] + 0.4))
    axes = figure.add_axes(box)
    axes.imshow(sheet, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    names = ["full data" if line.is_full else line.method for line in shown]
    axes.set_yticks([(height + 2) * place + height / 2 for place in range(len(shown))], names, fontsize=8)
    axes.tick_params(length=0, labelcolor=light_color(INK))
    axes.spines[:].set_visible(False)
    ratio = max(line.prune for line in shown)
    axes.set_title(f"{title}, {100 * ratio:.10g} % pruned: a column is one noise and class", fontsize=9, loc="left")
    save_png(figure, path, colors=16 if (sheet == sheet[..., :1]).all() else 256)


def _agreement(folders: dict[str, Path]) -> dict[str, Any] | None:
    """Spearman's correlation between scores, if there are two or more."""
    scores = read_scores(folders)
    if scores is None or len(scores.scores) < 2:
        return None
    palette = Palette([], {}, neutral=[score.name for score in scores.scores])
    return sections.agreement(sections.Material(scores, [], [], [], {}, None, [], palette))


def _facts(m: SweepMaterial, ratios: Sequence[float]) -> list[tuple[str, str]]:
    methods = len({line.method for line in m.lines if not line.is_full})
    return [
        ("cells done", f"{m.cells - len(m.missing):,} of {m.cells:,}"),
        ("methods", str(methods)),
        ("ratios", ", ".join(f"{100 * ratio:.10g}\N{NO-BREAK SPACE}%" for ratio in ratios) or "–"),
        ("seeds", str(len(m.seeds))),
    ]
