"""The cells of a sweep by method and ratio: their values by seed, and how far they are from random selection."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from diffprune.reporting.tables import METRICS, Metric
from diffprune.sweeping.cells import Cell
from diffprune.sweeping.differences import Difference, paired_difference
from diffprune.sweeping.methods import FULL, RANDOM
from diffprune.sweeping.settings import SweepConfig


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
