"""The sections of a report: when each applies, and what the template gets for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffprune.reporting import figures, images, tables
from diffprune.reporting.inputs import Log, Score, Scores, Selection
from diffprune.reporting.palette import NEUTRAL, Palette
from diffprune.shards import ShardSpec

EXTREMES = 18
PAIRS = 8
WIDE, NARROW = 1050, 360  # two drawings of each broad figure: text keeps its size on a phone


@dataclass(frozen=True)
class Material:
    """Everything a report is made from, checked."""

    scores: Scores | None
    selections: list[Selection]
    evaluations: list[dict[str, Any]]
    logs: list[Log]
    samples: dict[str, ShardSpec]
    shards: ShardSpec | None
    class_names: list[str]
    color: Palette

    def class_name(self, label: int) -> str:
        """The class's name if one is known, else its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)


@dataclass(frozen=True)
class Builder:
    """One section: its anchor, its heading, whether it applies, what it shows."""

    id: str
    title: str
    applies: Callable[[Material], bool]
    build: Callable[[Material], Any]


def facts(m: Material) -> list[tuple[str, str]]:
    """The few counts under the headline: (what, how many)."""
    told: list[tuple[int, str, str]] = []
    if m.scores:
        classes = len(np.unique(m.scores.labels[m.scores.labels >= 0]))
        told += [(len(m.scores.keys), "image", "images"), (classes, "class", "classes")]
        told += [(len(m.scores.scores), "score", "scores")]
    told += [(len(m.selections), "selection", "selections"), (len(m.evaluations), "model", "models")]
    return [(one if count == 1 else many, f"{count:,}") for count, one, many in told if count]


def headline_of(m: Material) -> dict[str, Any] | None:
    """The one sentence that sums up the metrics."""
    return tables.headline(m.evaluations)


def results(m: Material) -> dict[str, Any]:
    """The metric table and the classes made."""
    table = tables.metric_table(m.evaluations)
    for row in table["rows"]:
        row["color"] = m.color(row["name"])
    classes = tables.made_classes(m.evaluations)
    if classes:
        classes["classes"] = [m.class_name(label) for label in classes["classes"]]
        for row in classes["rows"]:
            row["color"] = m.color(row["name"])
    return {"table": table, "classes": classes, "context": m.evaluations[0]["context"]}


def sample_grids(m: Material) -> list[dict[str, Any]]:
    """Generated images of each model."""
    cards = []
    for name, source in m.samples.items():
        uri, side, count = images.sample_grid(source)
        cards.append({"name": name, "color": m.color(name), "uri": uri, "side": side, "count": count})
    return cards


def memorization(m: Material) -> list[dict[str, Any]]:
    """Of each model, the generated images nearest to a training image, beside that image."""
    assert m.shards is not None
    closest = {e["name"]: e["memorization"]["closest_pairs"][:PAIRS] for e in _with_pairs(m)}
    real = images.thumbnails(m.shards, {pair["training"] for pairs in closest.values() for pair in pairs})
    rows = []
    for name, pairs in closest.items():
        made = images.thumbnails(m.samples[name], {pair["sample"] for pair in pairs})
        texts = tables.format_column([pair["distance"] for pair in pairs])
        shown = [
            {
                **pair,
                "distance": text,
                "made": _picture(made[pair["sample"]]),
                "real": _picture(real[pair["training"]]),
            }
            for pair, text in zip(pairs, texts, strict=True)
        ]
        rows.append({"name": name, "color": m.color(name), "pairs": shown})
    return rows


def training(m: Material) -> dict[str, Any]:
    """Loss curves, with where each ended."""
    colors = [m.color(log.name) for log in m.logs]
    alt = "Training loss by step: " + "; ".join(f"{log.name} from {log.losses[0]:.3g}" for log in m.logs)
    ends = [tables.format_column([float(log.losses[-max(1, len(log.losses) // 20) :].mean())])[0] for log in m.logs]
    lines = [
        {"name": log.name, "color": color, "steps": f"{int(log.steps.max()):,}", "end": end}
        for log, color, end in zip(m.logs, colors, ends, strict=True)
    ]
    draw = [figures.loss_curves(m.logs, colors, width, alt) for width in (WIDE, NARROW)]
    return {"wide": draw[0], "narrow": draw[1], "lines": lines}


def kept(m: Material) -> dict[str, Any]:
    """How many images each selection keeps, of all and of each class."""
    labels, shares = tables.retention(m.scores, m.selections) if m.scores else (np.zeros(0), np.zeros((0, 0)))
    total = len(m.scores.keys) if m.scores else None
    rows = []
    for i, selection in enumerate(m.selections):
        overall = len(selection.keys) / total if total else None
        cells = [tables.heat_cell(float(share), overall or 0) for share in shares[i]] if len(labels) else []
        rows.append(
            {
                "name": selection.name,
                "color": m.color(selection.name),
                "how": _how(selection.metadata),
                "count": f"{len(selection.keys):,}",
                "share": tables.percent(overall) if overall is not None else "–",
                "least": tables.percent(float(shares[i].min())) if len(labels) else "–",
                "most": tables.percent(float(shares[i].max())) if len(labels) else "–",
                "lost": int((shares[i] == 0).sum()) if len(labels) else 0,
                "cells": cells,
            }
        )
    drawn = None
    if len(labels) > tables.MAX_CLASSES:
        colors = [row["color"] for row in rows]
        alt = "Share of each class kept: " + "; ".join(f"{r['name']} {r['least']} to {r['most']}" for r in rows)
        drawn = [figures.retention_curves(list(shares), colors, width, alt) for width in (WIDE, NARROW)]
    return {"rows": rows, "classes": [m.class_name(int(label)) for label in labels], "figure": drawn}


def score_cards(m: Material) -> list[dict[str, Any]]:
    """One card per score: its histogram, and the images at its two ends."""
    assert m.scores is not None
    ends = {score.name: tables.extremes(m.scores, score, EXTREMES) for score in m.scores.scores}
    wanted = sorted({i for low, high in ends.values() for i in low + high})
    pictures = {}
    if m.shards is not None and wanted:
        names = {m.scores.shards[i] for i in wanted}
        pixels = images.thumbnails(m.shards, [m.scores.keys[i] for i in wanted], names)
        pictures = {key: _picture(image) for key, image in pixels.items()}
    return [_score_card(m, score, *ends[score.name], pictures) for score in m.scores.scores]


def agreement(m: Material) -> dict[str, Any]:
    """Rank correlation between scores."""
    assert m.scores is not None
    names = [score.name for score in m.scores.scores]
    rows = [
        {
            "name": name,
            "color": m.color(name),
            "cells": [
                {
                    "text": "–" if value is None else tables.signed(value),
                    "side": "more" if (value or 0) > 0 else "less",
                    "strength": f"{abs(value or 0):.2f}",
                    "self": i == j,
                }
                for j, value in enumerate(row)
            ],
        }
        for i, (name, row) in enumerate(zip(names, tables.correlations(m.scores.scores), strict=True))
    ]
    return {"names": names, "rows": rows}


def cluster_sizes(m: Material) -> dict[str, Any]:
    """How many images each cluster has."""
    assert m.scores is not None and m.scores.cluster is not None
    sizes = np.bincount(m.scores.cluster[m.scores.cluster >= 0])
    mean = tables.format_column([float(sizes.mean())])[0]
    alt = f"{len(sizes)} clusters of {sizes.min()} to {sizes.max()} images, {mean} on average"
    draw = [figures.cluster_sizes(sizes, None, NEUTRAL, width, alt) for width in (WIDE, NARROW)]
    stats = [
        ("clusters", f"{len(sizes):,}"),
        ("smallest", f"{sizes.min():,}"),
        ("median", f"{np.median(sizes):,.0f}"),
        ("largest", f"{sizes.max():,}"),
    ]
    return {"wide": draw[0], "narrow": draw[1], "stats": stats}


BUILDERS: Sequence[Builder] = (
    Builder("results", "Results", lambda m: bool(m.evaluations), results),
    Builder("samples", "Samples", lambda m: bool(m.samples), sample_grids),
    Builder("memorization", "Memorization", lambda m: bool(_with_pairs(m)), memorization),
    Builder("training", "Training", lambda m: bool(m.logs), training),
    Builder("kept", "What was kept", lambda m: bool(m.selections), kept),
    Builder("scores", "Scores", lambda m: bool(m.scores and m.scores.scores), score_cards),
    Builder("agreement", "Agreement", lambda m: bool(m.scores and len(m.scores.scores) > 1), agreement),
    Builder("clusters", "Clusters", lambda m: bool(m.scores and m.scores.cluster is not None), cluster_sizes),
)


def _score_card(
    m: Material, score: Score, lowest: list[int], highest: list[int], pictures: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    assert m.scores is not None
    ok = ~np.isnan(score.values)
    values = score.values[ok]
    if not len(values):
        return {"name": score.name, "color": m.color(score.name), "meaning": score.meaning, "figure": None}
    selection = next((s for s in m.selections if s.by == score.name), None)
    kept_rows = tables.in_selection(m.scores, selection)[ok] if selection else None
    quantiles = [float(q) for q in np.quantile(values, [0.05, 0.5, 0.95])]
    texts = tables.format_column(quantiles)
    alt = f"Histogram of {score.name}: 5 % below {texts[0]}, median {texts[1]}, 5 % above {texts[2]}"
    ordered = tables.format_column([float(score.values[i]) for i in lowest + highest])

    def thumb(row: int, text: str) -> dict[str, Any]:
        key, label = m.scores.keys[row], int(m.scores.labels[row])
        return {
            "key": key,
            "score": text,
            "label": m.class_name(label) if label >= 0 else "",
            **pictures.get(key, {}),
        }

    return {
        "name": score.name,
        "color": m.color(score.name),
        "meaning": score.meaning,
        "keep": _kept_end(score, selection),
        "figure": figures.histogram(values, kept_rows, m.color(score.name), alt),
        "stats": [(f"5{tables.PERCENT}", texts[0]), ("median", texts[1]), (f"95{tables.PERCENT}", texts[2])],
        "failed": int((~ok).sum()),
        "kept_by": selection.name if selection else None,
        "pictures": m.shards is not None,
        "lowest": [thumb(i, text) for i, text in zip(lowest, ordered, strict=False)],
        "highest": [thumb(i, text) for i, text in zip(highest, ordered[len(lowest) :], strict=True)],
    }


def _kept_end(score: Score, selection: Selection | None) -> tuple[str, str]:
    """The end that is kept, "lowest", "highest" or "", and by what: a selection by the score, else its method."""
    if selection is None:
        return score.keep, "what the method keeps"
    order = str(selection.metadata.get("order"))
    return (order, f"kept by {selection.name}") if order in ("highest", "lowest") else ("", "")


def _with_pairs(m: Material) -> list[dict[str, Any]]:
    """The evaluations whose generated images and training images can both be shown."""
    if m.shards is None:
        return []
    return [e for e in m.evaluations if e["name"] in m.samples and not _is_png(m.samples[e["name"]])]


def _picture(pixels: np.ndarray | None) -> dict[str, Any]:
    """A thumbnail for the template: its data URI, or none if unreadable, and whether to scale it without smoothing."""
    if pixels is None:
        return {"uri": None, "crisp": False}
    return {"uri": images.data_uri(pixels), "crisp": max(pixels.shape[:2]) <= images.LOSSLESS}


def _is_png(source: ShardSpec) -> bool:
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() == ".png"


def _how(metadata: dict[str, Any]) -> str:
    """A selection's order in words: "highest grand", "balanced, nearest within clusters"."""
    order, by, within = (metadata.get(name) for name in ("order", "by", "within"))
    words = " ".join(str(word) for word in (order, by) if word)
    if not words and metadata.get("dedup") is not None:
        return "all but near-duplicates"
    return f"{words}, {within} within clusters" if within else words
