"""The numbers of a report, as rows that the template prints: metrics, retention, correlation, provenance."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffprune.reporting.inputs import Score, Scores, Selection

MAX_CLASSES = 20  # that a table shows as columns
MAX_NAMES = 12  # that a note lists
PERCENT = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Metric:
    """A column of the metric tables. ``better`` is "low", "high", or "real": like real images.

    ``further`` ones say nearly what another one does; they stand in a table of their own, behind a fold.
    """

    key: str
    title: str
    better: str
    meaning: str
    unit: str = ""
    further: bool = False

    @property
    def percent(self) -> bool:
        return self.unit == "%"

    @property
    def arrow(self) -> str:
        return {"low": "↓", "high": "↑", "real": "≈"}[self.better]


METRICS = (
    Metric("frechet_distance", "Fréchet distance", "low", "between the embeddings of generated and real images"),
    Metric(
        "frechet_distance_infinity",
        "Fréchet at ∞",
        "low",
        "Fréchet distance extrapolated to endless samples",
        further=True,
    ),
    Metric(
        "kernel_distance", "Kernel distance", "low", "squared maximum mean discrepancy, which no sample count biases"
    ),
    Metric("precision", "Precision", "high", "share of generated images that fall where real ones are", "%"),
    Metric("recall", "Recall", "high", "share of real images that fall where generated ones are", "%"),
    Metric("f_score", "F-score", "high", "harmonic mean of precision and recall", "%"),
    Metric("density", "Density", "high", "how many real neighbourhoods hold a generated image, over k", further=True),
    Metric("coverage", "Coverage", "high", "share of real neighbourhoods with a generated image in them", "%"),
    Metric("vendi_score", "Vendi score", "real", "effective number of different images"),
    Metric("memorization_ratio", "Nearest training image", "real", "median distance to it, over that of real images"),
    Metric(
        "memorized_share",
        "Near copies",
        "real",
        "share nearer to a training image than 99\N{NO-BREAK SPACE}% of real images",
        "%",
    ),
    Metric(
        "class_kl_reference", "Class imbalance", "low", "KL divergence of the classes made from the real ones", "nats"
    ),
    Metric(
        "class_kl_uniform",
        "Unequal classes",
        "low",
        "KL divergence of the classes made from equal shares",
        "nats",
        True,
    ),
    Metric("label_agreement", "Right class", "high", "share recognised as the class that was asked for", "%"),
    Metric("same_seed_cosine", "Same seed", "high", "cosine between images that two models drew from the same noise"),
)


def metric_table(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns, rows and the row of real images; the best of a column is marked only if all rows are comparable."""
    comparable = len({_terms(e) for e in evaluations}) == 1
    columns = [m for m in METRICS if any(e["metrics"].get(m.key) is not None for e in evaluations)]
    rows: list[dict[str, Any]] = []
    for e in evaluations:
        training = e["context"].get("training_images")
        rows.append({"name": e["name"], "images": "–" if training is None else f"{training:,}", "cells": []})
    real: list[str] | None = [] if comparable else None
    for metric in columns:
        values = [e["metrics"].get(metric.key) for e in evaluations]
        told = real_value(metric.key, evaluations[0])
        texts = format_column([*values, told], percent=metric.percent, unit=False)
        given = [v for v in values if v is not None]
        best = {"low": min, "high": max}.get(metric.better)
        target = best(given) if best and comparable and len(given) > 1 else None
        for row, value, text in zip(rows, values, texts, strict=False):
            row["cells"].append({"text": text, "mark": "best" if value is not None and value == target else ""})
        if real is not None:
            real.append(texts[-1])
    table = {"columns": columns, "parts": column_parts(columns), "rows": rows, "real": real}
    return {**table, "comparable": comparable, "flags": told_flags((e["name"], e["context"]) for e in evaluations)}


def column_parts(metrics: Sequence[Metric]) -> list[list[int]]:
    """The places of the columns of the first table and, if there are some, of the second one."""
    parts = [[i for i, metric in enumerate(metrics) if metric.further == further] for further in (False, True)]
    return [part for part in parts if part]


def headline(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The pruned set whose model comes closest to the real images, and the full set's model, if comparable."""
    if len(evaluations) < 2 or len({_terms(e) for e in evaluations}) > 1:
        return None
    full = [e for e in evaluations if e["context"].get("kept") is None]
    pruned = [e for e in evaluations if e["context"].get("kept") is not None]
    if not pruned or any(_frechet(e) is None for e in evaluations):
        return None
    texts = dict(zip(map(id, evaluations), format_column([_frechet(e) for e in evaluations]), strict=True))
    best = min(pruned, key=_frechet)
    return {
        "name": best["name"],
        "distance": texts[id(best)],
        "training": best["context"].get("training_images"),
        # the reference is what was selected from, unless that was given beside it
        "of": None if best["context"].get("training") else best["context"]["reference"]["count"],
        "others": len(pruned) - 1,
        "full_name": full[0]["name"] if full else None,
        "full_distance": texts[id(full[0])] if full else None,
    }


def made_classes(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Share of each class among the generated images, beside the real ones'; None beyond what a table can show."""
    told = [(e["name"], e["classes"]) for e in evaluations if e.get("classes")]
    if not told:
        return None
    classes = list(told[0][1]["reference_shares"])
    if len(classes) > MAX_CLASSES or any(list(c["reference_shares"]) != classes for _, c in told):
        return None
    rows = [
        {
            "name": name,
            "cells": [heat_cell(c["shares"][one], c["reference_shares"][one]) for one in classes],
        }
        for name, c in told
    ]
    real = [percent(told[0][1]["reference_shares"][one]) for one in classes]
    return {"classes": [int(one) for one in classes], "rows": rows, "real": real, "k": told[0][1]["k"]}


def retention(scores: Scores, selections: Sequence[Selection]) -> tuple[np.ndarray, np.ndarray]:
    """Labels in ascending order [C] and the share of each class that each selection keeps [S, C]."""
    classes, members = np.unique(scores.labels[scores.labels >= 0], return_counts=True)
    shares = np.zeros((len(selections), len(classes)))
    for row, selection in enumerate(selections):
        labels = scores.labels[in_selection(scores, selection)]
        counts = np.bincount(np.searchsorted(classes, labels[labels >= 0]), minlength=len(classes))
        shares[row] = counts / members
    return classes, shares


def in_selection(scores: Scores, selection: Selection) -> np.ndarray:
    """Which rows of the score tables a selection keeps, [N] bool."""
    return np.fromiter((key in selection.keys for key in scores.keys), dtype=bool, count=len(scores.keys))


def correlations(scores: Sequence[Score]) -> list[list[float | None]]:
    """Spearman's rank correlation of every two scores over the samples that have both; null if one is constant."""
    table: list[list[float | None]] = []
    for a in scores:
        row: list[float | None] = []
        for b in scores:
            both = ~np.isnan(a.values) & ~np.isnan(b.values)
            x, y = _ranks(a.values[both]), _ranks(b.values[both])
            constant = both.sum() < 2 or np.ptp(x) == 0 or np.ptp(y) == 0
            row.append(None if constant else float(np.corrcoef(x, y)[0, 1]))
        table.append(row)
    return table


def extremes(scores: Scores, score: Score, count: int) -> tuple[list[int], list[int]]:
    """Rows of the ``count`` lowest (ascending) and highest (descending) scored samples; ties by key."""
    rows = [int(i) for i in np.flatnonzero(~np.isnan(score.values))]
    lowest = sorted(rows, key=lambda i: (score.values[i], scores.keys[i]))[:count]
    highest = sorted(rows, key=lambda i: (-score.values[i], scores.keys[i]))[:count]
    return lowest, highest


def heat_cell(value: float, neutral: float) -> dict[str, Any]:
    """A share as text, and its colour: how far from ``neutral`` on a log scale, full at a factor of four."""
    if neutral <= 0 or value == neutral:
        strength = 0.0
    elif value <= 0:
        strength = -1.0
    else:
        strength = max(-1.0, min(1.0, math.log(value / neutral, 4)))
    return {"text": percent(value), "side": "more" if strength > 0 else "less", "strength": f"{abs(strength):.2f}"}


def percent(value: float) -> str:
    """A share with one decimal, 0 and 1 without."""
    return f"{100 * value:.0f}{PERCENT}" if value in (0, 1) else f"{100 * value:.1f}{PERCENT}"


def format_column(values: Sequence[float | None], *, percent: bool = False, unit: bool = True) -> list[str]:
    """Numbers of one column to the same number of decimals, at most four; "–" for None.

    Four significant digits of the largest; powers of ten if it is under 0.001 or over a million. ``unit``: with %.
    """
    shown = [None if v is None else 100 * v if percent else v for v in values]
    largest = max((abs(v) for v in shown if v is not None), default=0.0)
    if percent:
        form = ",.1f"
    elif largest and not 1e-3 <= largest < 1e6:
        form = ".2e"
    else:
        form = f",.{max(0, min(4, 3 - math.floor(math.log10(largest)))) if largest else 0}f"
    sign = PERCENT if percent and unit else ""
    return ["–" if v is None else _minus(f"{v:{form}}{sign}") for v in shown]


def seeds_told(counts: Iterable[int]) -> str:
    """How many seeds numbers are of: "1 seed", "3 seeds", "1 to 3 seeds"."""
    found = sorted(counts)
    fewest, most = found[0], found[-1]
    return f"{fewest} to {most} seeds" if fewest < most else f"{most} seed{'' if most == 1 else 's'}"


def signed(value: float) -> str:
    """A correlation: sign and two decimals."""
    return _minus(f"{value:+.2f}") if abs(value) >= 0.005 else "0.00"


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted name, text) pairs; digests shortened to 12 digits, floats to 6."""
    if isinstance(value, dict):
        return [pair for key in sorted(value) for pair in flatten(value[key], f"{prefix}{key}.")]
    if value is None or value == []:
        return []
    parts = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in (value if isinstance(value, list) else [value])]
    return [(prefix.rstrip("."), re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b", r"\1…", ", ".join(parts)))]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, the mean rank for ties."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _frechet(evaluation: dict[str, Any]) -> float | None:
    return evaluation["metrics"]["frechet_distance"]


def _minus(text: str) -> str:
    """With the minus sign, and 1e-05 as 1e−5."""
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", text).replace("-", "−").replace("e+", "e")


def _terms(evaluation: dict[str, Any]) -> str:
    """What must agree for two evaluations' numbers to be compared."""
    context = evaluation["context"]
    reference = context["reference"]
    # Paths are spelled in many ways: the same features have the same Vendi score.
    likeness = f"{reference.get('vendi_score') or 0:.6g}"
    parts = [context["embedder"], reference["count"], likeness, context["samples"]["count"]]
    sampling = context.get("sampling") or {}
    how = ("steps", "method", "rtol", "atol", "guidance", "guidance_channels", "precision")
    parts += [sampling.get(name) for name in how]
    return repr([*parts, *(context.get(name) for name in ("k", "class_k", "limit"))])


def real_value(key: str, evaluation: dict[str, Any]) -> float | None:
    """What real images have in a metric, where that is known."""
    classes = evaluation.get("classes") or {}
    shares = list(classes.get("reference_shares", {}).values())
    return {
        "vendi_score": evaluation["context"]["reference"].get("vendi_score"),
        "memorization_ratio": 1.0,
        "memorized_share": 0.01,
        "class_kl_reference": 0.0 if classes else None,
        "class_kl_uniform": sum(p * math.log(p * len(shares)) for p in shares if p) if shares else None,
        "label_agreement": classes.get("reference_accuracy"),
    }.get(key)


def told_flags(results: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """Every one of the ``flags`` of named results once, with the names that it is about unless it is about all."""
    about: dict[str, list[str]] = {}
    whole = 0
    for name, result in results:
        whole += 1
        for flag in result.get("flags", []):
            about.setdefault(flag, []).append(str(name))
    told = []
    for flag, names in about.items():
        some = list(dict.fromkeys(names))
        more = f" and {len(some) - MAX_NAMES:,} more" if len(some) > MAX_NAMES else ""
        told.append(flag if len(names) == whole else f"{', '.join(some[:MAX_NAMES])}{more}: {flag}")
    return told
