"""The page of ``cluster --choose-k``: three curves, a table, and what they recommend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffprune._version import __version__
from diffprune.files import atomic_path
from diffprune.reporting.build import render
from diffprune.reporting.figures import curve_over_k
from diffprune.storage import AnyPath

if TYPE_CHECKING:
    from diffprune.cluster_count import Advice, Trial

CURVES = (  # field, title, meaning, colour
    (
        "inertia",
        "Inertia",
        "Mean squared distance of an embedding to its centroid. It always falls; past the knee, less.",
        "var(--series-0)",
    ),
    (
        "silhouette",
        "Silhouette",
        "How much nearer an embedding is to its own cluster than to the next one: 1 is far apart, 0 is not at all.",
        "var(--series-1)",
    ),
    (
        "stability",
        "Stability",
        "Adjusted Rand index between clusterings of two halves: 1 if both halves give the same clusters, 0 for chance.",
        "var(--series-2)",
    ),
)


def write_page(path: AnyPath, trials: Sequence[Trial], advice: Advice, facts: Mapping[str, Any]) -> None:
    """Write one HTML file that needs nothing else. The same values give the same bytes."""
    ks = [trial.k for trial in trials]
    curves = []
    for name, title, meaning, color in CURVES:
        values = [getattr(trial, name) for trial in trials]
        errors = None if name == "inertia" else [2 * getattr(trial, f"{name}_error") for trial in trials]
        alt = f"{title} for k from {ks[0]} to {ks[-1]}"
        figure = curve_over_k(ks, values, errors, advice.k, color, width=340, alt=alt)
        curves.append({"title": title, "meaning": meaning, "color": color, "figure": figure})
    page = render(
        "cluster_count.html.j2",
        version=__version__,
        trials=trials,
        advice=advice,
        curves=curves,
        facts=facts,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
