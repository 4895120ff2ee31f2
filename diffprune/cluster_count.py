"""``choose_k``: how many clusters? Inertia, silhouette and stability over a range of k, and what they recommend."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffprune.embedding_rows import EmbeddingRows
from diffprune.errors import InputError
from diffprune.files import write_json
from diffprune.kmeans import KMeans
from diffprune.kmeans_lloyd import TooFewPointsError
from diffprune.kmeans_points import open_points
from diffprune.progress import progress
from diffprune.reporting.cluster_count import write_page
from diffprune.storage import as_path

PAGE, VALUES = "choose_k.html", "choose_k.json"
MINIMUM = 3
"""Numbers of clusters to choose among: fewer make no curve."""

REPEATS = 3
"""Pairs of halves for the stability."""

SILHOUETTE_SAMPLE = 1000
WEAK_SILHOUETTE = 0.1
"""Below, a point is hardly nearer to its own cluster than to the next one."""

CLEAR_KNEE = 0.15
"""How far below its chord an inertia curve bends, of its height, for its knee to count."""


@dataclass(frozen=True)
class Trial:
    """What one k gave. Errors are standard errors; the stability's is over the pairs of halves."""

    k: int
    inertia: float  # mean squared distance
    explained: float  # share of the variance, in [0, 1]
    silhouette: float
    silhouette_error: float
    stability: float
    stability_error: float
    smallest: int  # cluster of the sample


@dataclass(frozen=True)
class Advice:
    """The k to take, how sure that is, why, and which k each of the three measures would accept."""

    k: int
    sure: str  # "sure", "fairly sure" or "not sure"
    reasons: list[str]
    accepted: dict[str, list[int]]


def choose_k(
    embeddings: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    ks: str | Sequence[int],
    sample: int = 100_000,
    seed: int = 0,
    max_iter: int = 100,
    metric: str = "euclidean",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Cluster a sample with each k of ``ks`` and write ``<out>/choose_k.html`` and ``choose_k.json``.

    ``ks``: numbers, or text as in ``parse_ks``. ``sample``: that many embeddings at most, drawn by ``seed``; see
    ``measure`` and ``advise`` for what is computed. Returns the recommended ``k``, ``sure``, ``reasons`` and the
    values per k. A k above the number of distinct embeddings in half of the sample is left out, and a reason says so.
    Raises InputError if fewer than 3 are left.
    """
    wanted = parse_ks(ks) if isinstance(ks, str) else sorted(set(ks))
    if len(wanted) < MINIMUM or wanted[0] < 2:
        raise InputError(f"choose-k: expected at least {MINIMUM} numbers of clusters of at least 2, got {wanted}")
    source = EmbeddingRows(embeddings)
    count = min(sample, source.rows)
    if wanted[-1] > count // 4:
        raise InputError(
            f"choose-k: {wanted[-1]} clusters need a sample of at least {4 * wanted[-1]} embeddings, got {count}; "
            + ("use a larger sample" if count < source.rows else "try fewer clusters")
        )
    out = as_path(out)
    if seed < 0:
        raise InputError(f"choose-k: expected a seed of 0 or more, got {seed}")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder, found a file")
    plan = {"stage": "choose-k", "ks": wanted, "sample": count, "embeddings": source.rows, "out": str(out)}
    if dry_run:
        return {**plan, "dry_run": True}
    rows = np.sort(np.random.default_rng(seed).permutation(source.rows)[:count])
    points = open_points(source.parts, metric=metric, memory=1).take(torch.from_numpy(rows))
    trials = measure(points, wanted, seed=seed, max_iter=max_iter, metric=metric, keys=source.keys.take(rows))
    left_out = sorted(set(wanted) - {trial.k for trial in trials})
    if len(trials) < MINIMUM:
        raise InputError(
            f"choose-k: half of the sample has fewer distinct embeddings than {', '.join(map(str, left_out))} "
            f"clusters: expected at least {MINIMUM} numbers that can be tried, got {len(trials)}; try fewer clusters"
        )
    advice = advise(trials)
    if left_out:
        told = f"{', '.join(map(str, left_out))} left out: half of the sample has fewer distinct embeddings"
        advice = replace(advice, reasons=[*advice.reasons, told])
    facts = {"model": source.metadata.get("model"), "metric": metric, "seed": seed, **plan}
    write_json(out / VALUES, {**facts, "trials": [asdict(trial) for trial in trials], "advice": asdict(advice)})
    write_page(out / PAGE, trials, advice, facts)
    return {**plan, "k": advice.k, "sure": advice.sure, "reasons": advice.reasons, "page": str(out / PAGE)}


def parse_ks(text: str) -> list[int]:
    """Numbers with commas, ascending; "8,16,...,4096" goes on by the same factor, "10,20,...,50" by the same step."""
    parts = [part.strip() for part in re.sub(r"…", "...", text).split(",")]
    try:
        if "..." not in parts:
            return sorted({int(part) for part in parts})
        at = parts.index("...")
        before, after = [int(part) for part in parts[:at]], [int(part) for part in parts[at + 1 :]]
        first, second, last = before[-2], before[-1], after[0]
    except (ValueError, IndexError):
        raise InputError(f"choose-k: expected numbers such as 8,16,32 or 8,16,...,4096, got {text!r}") from None
    for go_on in (lambda k: k * second // first if second % first == 0 else 0, lambda k: k + second - first):
        reached = [second]
        while reached[-1] < last and go_on(reached[-1]) > reached[-1]:
            reached.append(go_on(reached[-1]))
        if reached[-1] == last:
            return sorted({*before, *reached, *after})
    raise InputError(f"choose-k: {first},{second},... reaches {last} neither by a factor nor by a step")


def measure(
    points: Tensor,
    ks: Sequence[int],
    *,
    seed: int = 0,
    max_iter: int = 100,
    metric: str = "euclidean",
    keys: Sequence[str] | None = None,
) -> list[Trial]:
    """Each k on ``points`` [N, D].

    Inertia of a clustering of all; the silhouette (Rousseeuw 1987) of up to 1000 of them against all points; and
    the stability: k-means on either half of the points, all points assigned by both, their adjusted Rand index (Hubert
    and Arabie 1985), for three divisions into halves. No trial of a k above the number of distinct points in a half.
    """
    options: dict[str, Any] = {"init": "k-means||", "max_iter": max_iter, "metric": metric}
    rng = np.random.default_rng(seed)
    halves = [torch.from_numpy(rng.permutation(len(points))) for _ in range(REPEATS)]
    looked_at = torch.from_numpy(np.sort(rng.permutation(len(points))[:SILHOUETTE_SAMPLE]))
    done: list[int] = []
    fits, agreements = [], []

    def fitted(k: int, points: Tensor, seed: int, keys: Sequence[str] | None = None) -> KMeans:
        found = KMeans(k, seed=seed, **options).fit(points, keys=keys)
        bar.advance(note=f"k={k}")
        return found

    def agreements_of(k: int) -> np.ndarray:
        found = []
        for i, order in enumerate(halves):
            parts = [points[half.sort().values] for half in order.split((len(order) + 1) // 2)]
            found.append(adjusted_rand(*(fitted(k, part, seed + i).predict(points).numpy() for part in parts)))
        return np.array(found)

    with progress("choose-k", total=len(ks) * (1 + 2 * REPEATS), unit="clusterings") as bar:
        for k in ks:
            try:
                whole, agreed = fitted(k, points, seed, keys), agreements_of(k)
            except TooFewPointsError:
                continue
            done.append(k)
            fits.append(whole)
            agreements.append(agreed)
    if not done:
        return []
    scaled = points if metric == "euclidean" else torch.nn.functional.normalize(points, dim=1)
    silhouettes = silhouette(scaled, [fit.assignment_ for fit in fits], looked_at)
    mean = scaled.double().mean(dim=0)
    variance = float((scaled.double() - mean).square().sum(dim=1).mean())
    return [
        Trial(
            k=k,
            inertia=fit.inertia_ / len(points),
            explained=1 - fit.inertia_ / len(points) / variance,
            silhouette=float(values.mean()),
            silhouette_error=float(values.std() / np.sqrt(len(values))),
            stability=float(agreement.mean()),
            stability_error=float(agreement.std(ddof=1) / np.sqrt(REPEATS)),
            smallest=int(fit.assignment_.bincount().min()),
        )
        for k, fit, values, agreement in zip(done, fits, silhouettes, agreements, strict=True)
    ]


def silhouette(points: Tensor, assignments: Sequence[Tensor], rows: Tensor) -> list[np.ndarray]:
    """The silhouette of each of ``rows`` [S] in each clustering [N] of ``points`` [N, D]: [S] each (Rousseeuw 1987).

    s = (b - a)/max(a, b), a the mean distance to the others of the own cluster, b that to the nearest other cluster; 0
    for a cluster of one. Of clusterings with two clusters or more. Time S·N·(D + clusterings); no N×N matrix.
    """
    points = points - points.mean(dim=0)
    ks = [int(assignment.max()) + 1 for assignment in assignments]
    sizes = [assignment.bincount(minlength=k).double() for assignment, k in zip(assignments, ks, strict=True)]
    result: list[list[np.ndarray]] = [[] for _ in assignments]
    for own in rows.split(max(1, 2**24 // len(points))):
        distance = torch.cdist(points[own], points).double()
        distance[torch.arange(len(own)), own] = 0  # not quite so from a matrix product
        for values, assignment, k, size in zip(result, assignments, ks, sizes, strict=True):
            sums = distance.new_zeros(k, len(own)).index_add_(0, assignment.long(), distance.T).T
            label = assignment[own].long()[:, None]
            others = (size[label] - 1)[:, 0]
            inside = sums.gather(1, label)[:, 0] / others.clamp(min=1)
            outside = (sums / size).scatter(1, label, torch.inf).amin(dim=1)
            value = (outside - inside) / torch.maximum(inside, outside)
            values.append(torch.where(others > 0, value.nan_to_num(), 0).numpy())
    return [np.concatenate(values) for values in result]


def adjusted_rand(first: np.ndarray, second: np.ndarray) -> float:
    """How much two labelings [N] agree on which pairs belong together: 1 fully, 0 as by chance (Hubert and Arabie)."""
    width = int(second.max()) + 1
    cells = np.unique(first.astype(np.int64) * width + second, return_counts=True)[1].astype(np.float64)
    rows, columns = (np.bincount(labels).astype(np.float64) for labels in (first, second))
    together, in_first, in_second = (float((n * (n - 1)).sum()) / 2 for n in (cells, rows, columns))
    pairs = len(first) * (len(first) - 1) / 2
    expected, most = in_first * in_second / pairs, (in_first + in_second) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def knee(ks: Sequence[int], inertia: Sequence[float]) -> tuple[int, float]:
    """The k where the inertia curve over log k is farthest below its chord, and how far, of its height.

    Satopää et al., "Finding a 'kneedle' in a haystack", 2011, without smoothing.
    """
    x, y = np.log(np.asarray(ks, float)), np.asarray(inertia, float)
    if y[0] <= y[-1]:
        return ks[-1], 0.0
    below = 1 - (x - x[0]) / (x[-1] - x[0]) - (y - y[-1]) / (y[0] - y[-1])
    return ks[int(below.argmax())], float(below.max())


def advise(trials: Sequence[Trial]) -> Advice:
    """The k that most of the three measures accept, the largest silhouette deciding between equals.

    The knee accepts its k; the silhouette and the stability each k that is within two standard errors of the best. One
    that accepts more than half of what was tried, as a best value with a wide error does, makes nothing surer.
    """
    ks = [trial.k for trial in trials]
    bend, depth = knee(ks, [trial.inertia for trial in trials])
    accepted = {
        "inertia": [bend] if depth >= CLEAR_KNEE else [],
        "silhouette": _near_best(ks, [(t.silhouette, t.silhouette_error) for t in trials]),
        "stability": _near_best(ks, [(t.stability, t.stability_error) for t in trials]),
    }
    votes = {k: sum(k in found for found in accepted.values()) for k in ks}
    chosen = max(trials, key=lambda trial: (votes[trial.k], trial.silhouette))
    reasons = [_reason(name, found, chosen.k, len(ks)) for name, found in accepted.items()]
    level = sum(chosen.k in found for found in accepted.values() if 2 * len(found) <= len(ks))
    if chosen.silhouette < WEAK_SILHOUETTE:
        level = min(level, 1)
        reasons.append(
            f"the silhouette is {chosen.silhouette:.2f}: the clusters run into each other, there is no true number of "
            f"them; take k by how finely the selection should balance"
        )
    if chosen.k in (ks[0], ks[-1]):
        level = min(level, 2)
        reasons.append(f"{chosen.k} is the {'smallest' if chosen.k == ks[0] else 'largest'} that was tried; try more")
    return Advice(chosen.k, ("not sure", "not sure", "fairly sure", "sure")[level], reasons, accepted)


def _near_best(ks: Sequence[int], values: Sequence[tuple[float, float]]) -> list[int]:
    best, error = max(values)
    return [k for k, (value, own) in zip(ks, values, strict=True) if value >= best - 2 * float(np.hypot(error, own))]


def _reason(name: str, accepted: Sequence[int], k: int, tried: int) -> str:
    if not accepted:
        return "the inertia falls without a clear knee"
    what = {"inertia": "the knee of the inertia", "silhouette": "the silhouette", "stability": "the stability"}[name]
    verb = "is at" if name == "inertia" else "is best, within its error, at"
    found = ", ".join(map(str, accepted))
    if 2 * len(accepted) > tried:
        return f"{what} cannot tell {found} apart, within its error"
    return f"{what} {verb} {found}" + ("" if k in accepted else f", not {k}")
