"""Figures as inline SVG whose colours are the page's CSS variables: they follow its light or dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator

from diffprune.reporting.inputs import Log

INK, MUTED, LINE = "var(--ink)", "var(--muted)", "var(--line)"
TEXT_SIZE = 11
BINS = 46
CURVE_POINTS = 100

# Text stays text, in the page's own font, and ids do not differ from run to run.
_RC = {"svg.fonttype": "none", "svg.hashsalt": "diffprune"}


def histogram(values: np.ndarray, kept: np.ndarray | None, color: str, alt: str) -> Markup:
    """How scores ``values`` [N] spread; ``kept`` [N] bool, if given, stands out. Outliers are in the last bars."""
    low, high = _robust_range(values)
    edges = np.linspace(low, high, BINS + 1)
    clipped = np.clip(values, low, high)

    def draw(axes: Axes, ink: Callable[[str], str]) -> None:
        step = edges[1] - edges[0]
        for part, alpha in (
            (clipped, 0.30 if kept is not None else 0.85),
            (clipped[kept] if kept is not None else [], 1),
        ):
            counts, _ = np.histogram(part, edges)
            axes.bar(edges[:-1] + step / 2, counts, width=step * 0.86, color=ink(color), alpha=alpha, linewidth=0)
        axes.axvline(float(np.median(values)), color=ink(INK), linewidth=1, dashes=(3, 2.5))
        axes.set_xlim(low - step, high + step)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, high - low)))
        axes.set_yticks([])

    return svg_figure(draw, width=330, height=150, margins=(10, 12, 10, 26), alt=alt)


def loss_curves(logs: Sequence[Log], colors: Sequence[str], width: int, alt: str) -> Markup:
    """Loss against step, one line per log, averaged over stretches of the run."""

    def draw(axes: Axes, ink: Callable[[str], str]) -> None:
        for log, color in zip(logs, colors, strict=True):
            steps, losses = _averaged(log)
            line: dict[str, Any] = {"color": ink(color), "solid_capstyle": "round", "solid_joinstyle": "round"}
            axes.plot(steps, losses, linewidth=1.8, **line)
            if len(steps) == 1:  # a line of one point is not drawn
                axes.plot([*steps, *steps], [*losses, *losses], linewidth=6, **line)
        tail = np.concatenate([_averaged(log)[1] for log in logs])
        if tail.min() > 0 and tail.max() / tail.min() > 8:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(max(3, width // 110), integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.01)
        axes.set_xlabel("training step")
        horizontal_grid(axes, ink)

    return svg_figure(draw, width=width, height=260, margins=(44, 14, 10, 42), alt=alt)


def cluster_sizes(sizes: np.ndarray, kept: np.ndarray | None, color: str, width: int, alt: str) -> Markup:
    """Images per cluster, largest first; the dashed line is the mean. ``sizes`` and ``kept`` [K] are aligned."""
    order = np.argsort(-sizes, kind="stable")

    def draw(axes: Axes, ink: Callable[[str], str]) -> None:
        edges = np.arange(len(sizes) + 1)
        for part, alpha in ((sizes, 0.30 if kept is not None else 0.85), (kept, 1)):
            if part is not None and len(sizes) <= width // 4:
                axes.bar(edges[:-1] + 0.5, part[order], width=0.8, color=ink(color), alpha=alpha, linewidth=0)
            elif part is not None:
                axes.stairs(part[order], edges, fill=True, color=ink(color), alpha=alpha, linewidth=0)
        axes.axhline(float(sizes.mean()), color=ink(INK), linewidth=1, dashes=(3, 2.5))
        axes.set_xlim(0, len(sizes))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("clusters, largest first")
        horizontal_grid(axes, ink)

    return svg_figure(draw, width=width, height=220, margins=(44, 10, 14, 42), alt=alt)


def curve_over_k(
    ks: Sequence[int],
    values: Sequence[float],
    errors: Sequence[float] | None,
    chosen: int,
    color: str,
    width: int,
    alt: str,
) -> Markup:
    """A measure over the number of clusters, with the half widths ``errors`` of its bars; ``chosen`` is marked."""

    def draw(axes: Axes, ink: Callable[[str], str]) -> None:
        axes.axvline(chosen, color=ink(INK), linewidth=1, dashes=(3, 2.5))
        axes.plot(ks, values, color=ink(color), linewidth=1.8)
        half = np.zeros(len(ks)) if errors is None else np.asarray(errors)
        for k, value, error in zip(ks, values, half, strict=True):  # markers would be shared by ids between figures
            axes.plot([k, k], [value, value], color=ink(color), linewidth=6, solid_capstyle="round")
            axes.plot([k, k], [value - error, value + error], color=ink(color), linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(list(ks)[:: math.ceil(len(ks) / 7)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("clusters")
        axes.margins(x=0.04)
        horizontal_grid(axes, ink)

    return svg_figure(draw, width=width, height=230, margins=(52, 12, 10, 42), alt=alt)


def retention_curves(rows: Sequence[np.ndarray], colors: Sequence[str], width: int, alt: str) -> Markup:
    """Share of each class kept, classes sorted per selection: for more classes than a table can show."""

    def draw(axes: Axes, ink: Callable[[str], str]) -> None:
        for row, color in zip(rows, colors, strict=True):
            axes.plot(np.linspace(0, 100, len(row)), np.sort(row)[::-1] * 100, color=ink(color), linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("classes, most kept first (% of classes)")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.margins(x=0.01)
        horizontal_grid(axes, ink)

    return svg_figure(draw, width=width, height=260, margins=(50, 14, 10, 42), alt=alt)


def _tick(value: float, span: float) -> str:
    """A short label: plain numbers, or powers of ten where those would be long."""
    if abs(value) < span / 1e6:
        return "0"
    text = f"{value:.4g}" if 1e-2 <= span < 1e6 else f"{value:.1e}"
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", text).replace("e+", "e").replace("-", "−")


def _robust_range(values: np.ndarray) -> tuple[float, float]:
    """The values' range, or where a few outliers stretch it, that of the middle 99 %."""
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = (float(q) for q in np.quantile(values, [0.005, 0.995]))
    if inner_high > inner_low and high - low > 1.6 * (inner_high - inner_low):
        pad = 0.05 * (inner_high - inner_low)
        low, high = max(low, inner_low - pad), min(high, inner_high + pad)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _averaged(log: Log) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(log.steps, kind="stable")
    parts = np.array_split(order, min(CURVE_POINTS, len(order)))
    return np.array([log.steps[p].mean() for p in parts]), np.array([log.losses[p].mean() for p in parts])


def horizontal_grid(axes: Axes, ink: Callable[[str], str]) -> None:
    axes.grid(axis="y", color=ink(LINE), linewidth=1)
    axes.set_axisbelow(True)


@dataclass
class _Inks:
    """Matplotlib knows no CSS variables: each is drawn as a colour of its own and put back afterwards."""

    used: dict[str, str] = field(default_factory=dict)

    def __call__(self, css: str) -> str:
        return self.used.setdefault(css, f"#{0xFACE00 + len(self.used):06x}")


def svg_figure(
    draw: Callable[[Axes, Callable[[str], str]], Any],
    *,
    width: int,
    height: int,
    margins: tuple[int, int, int, int],  # left, right, top, bottom, in px
    alt: str,
) -> Markup:
    ink = _Inks()
    left, right, top, bottom = margins
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # 1 pt is 1 px of the page
        box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
        axes = figure.add_axes(box)
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(ink(LINE))
        axes.tick_params(which="both", length=0, labelsize=TEXT_SIZE, labelcolor=ink(MUTED), pad=6)
        axes.xaxis.label.set(size=TEXT_SIZE, color=ink(MUTED))
        axes.xaxis.labelpad = 5
        draw(axes, ink)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(_for_page(buffer.getvalue(), ink.used, width, alt))


def _for_page(svg: str, inks: dict[str, str], width: int, alt: str) -> str:
    """Cut what an inline figure must not bring (XML head, metadata, ids that repeat, its font), and name it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    view = re.search(r'viewBox="([^"]*)"', svg)
    head = f'<svg class="figure" role="img" aria-label="{Markup.escape(alt)}" viewBox="{view.group(1) if view else ""}"'
    svg = re.sub(r"<svg[^>]*>", lambda _: f'{head} style="max-width: {width}px">', svg, count=1)
    for css, sentinel in inks.items():
        svg = svg.replace(sentinel, css)
    return svg
