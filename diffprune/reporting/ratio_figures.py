"""Metrics over the pruning ratio, a line per method: as SVG for the page, as PNG for documents."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from PIL import Image

from diffprune.files import atomic_path
from diffprune.reporting.figures import INK, LINE, MUTED, horizontal_grid, svg_figure

DASHES: tuple[tuple[float, ...], ...] = ((), (4.5, 1.8), (1.2, 1.4), (6, 1.6, 1.2, 1.6), (2.6, 1.2), (8, 2))
_PNG_COLUMNS = 3


@dataclass(frozen=True)
class RatioLine:
    """One method: CSS colour, dash pattern; pruned fractions, means and standard deviations [R], NaN for none."""

    name: str
    color: str
    dash: tuple[float, ...]
    ratios: Sequence[float]
    means: Sequence[float]
    spreads: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One metric: its lines, and mean and standard deviation (NaN for none) of the models of all data, if there are."""

    title: str
    percent: bool
    lines: Sequence[RatioLine]
    full: tuple[float, float] | None


def panel_svg(panel: Panel, width: int) -> Markup:
    """A panel for the page."""
    names = ", ".join(line.name for line in panel.lines)
    alt = f"{panel.title} by pruned share, of {names}"
    return svg_figure(
        lambda axes, ink: _draw(axes, ink, panel), width=width, height=230, margins=(54, 12, 10, 42), alt=alt
    )


def panels_png(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Panels side by side with one legend, in the colours of a light page. The same values give the same bytes."""
    rows = math.ceil(len(panels) / _PNG_COLUMNS)
    figure = Figure(figsize=(3.6 * _PNG_COLUMNS, 2.7 * rows + 0.8), dpi=100, facecolor="white")
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, _PNG_COLUMNS, place + 1)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(light_color(LINE))
        axes.tick_params(which="both", length=0, labelsize=8, labelcolor=light_color(MUTED))
        axes.xaxis.label.set(size=8, color=light_color(MUTED))
        axes.set_title(panel.title, fontsize=10, loc="left", color=light_color(INK))
        _draw(axes, light_color, panel)
    first = panels[0]
    handles = [
        Line2D([], [], color=light_color(line.color), linewidth=1.8, dashes=line.dash or (None, None), label=line.name)
        for line in first.lines
    ]
    if any(panel.full for panel in panels):
        handles.append(Line2D([], [], color=light_color(INK), linewidth=1.2, dashes=(3, 2.5), label="full data"))
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=light_color(INK))
    figure.legend(handles=handles, loc="lower left", ncol=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.03 + 0.12 / rows, 1, 1))
    save_png(figure, path)


def save_png(figure: Figure, path: Path, colors: int = 64) -> None:
    """Write a figure as a PNG of at most so many colours: a fraction of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    image = Image.open(buffer).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", optimize=True)


@lru_cache(maxsize=64)
def light_color(css: str) -> str:
    """The hex colour that a CSS variable of the page has on a light page."""
    name = css.removeprefix("var(").removesuffix(")")
    style = (Path(__file__).parent / "style.css.j2").read_text(encoding="utf-8")
    return re.search(rf"{re.escape(name)}: (#[0-9a-f]{{6}})", style).group(1)


def _draw(axes: Axes, ink: Callable[[str], str], panel: Panel) -> None:
    scale = 100 if panel.percent else 1
    ratios = sorted({ratio for line in panel.lines for ratio in line.ratios})
    step = 100 * min([b - a for a, b in pairwise(ratios)] or [0.2])
    if panel.full is not None:
        mean, spread = (scale * value for value in panel.full)
        axes.axhline(mean, color=ink(INK), linewidth=1.2, dashes=(3, 2.5))
        if not math.isnan(spread):
            axes.axhspan(mean - spread, mean + spread, color=ink(INK), alpha=0.08, linewidth=0)
    for number, line in enumerate(panel.lines):
        # beside each other, so that bars of one ratio can be told apart
        aside = step * min(0.4, 0.05 * len(panel.lines)) * ((number + 0.5) / len(panel.lines) - 0.5)
        x = 100 * np.asarray(line.ratios) + aside
        y, half = scale * np.asarray(line.means), scale * np.asarray(line.spreads)
        color = ink(line.color)
        axes.plot(x, y, color=color, linewidth=1.5, dashes=line.dash or (None, None))
        for at, value, error in zip(x, y, half, strict=True):
            axes.plot([at, at], [value, value], color=color, linewidth=4.5, solid_capstyle="round")
            if not math.isnan(error):
                axes.plot([at, at], [value - error, value + error], color=color, linewidth=1)
    axes.xaxis.set_major_locator(FixedLocator([100 * ratio for ratio in ratios]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("pruned")
    axes.margins(x=0.06)
    horizontal_grid(axes, ink)
