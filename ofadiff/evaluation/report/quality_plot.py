"""`quality_vs_size.png`: quality against parameters."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from ofadiff.evaluation.report.results import Results
from ofadiff.evaluation.report.rows import JOINT, VARIANTS, Column, Row

# A panel whose values span more than this factor gets a logarithmic axis.
LOG_SPAN = 6


@dataclass(frozen=True)
class Palette:
    """Colours of a plot: its ground, text, grid, the report's own series, and baselines."""

    paper: str
    ink: str
    grid: str
    joint: str
    baselines: tuple[str, ...]


LIGHT = Palette("#ffffff", "#3b4554", "#e4e8ee", "#2f5fd0", ("#d9822b", "#8a6fb8", "#4a9a8d"))
DARK = Palette("#171b22", "#b6c0ce", "#2b323d", "#7ea6ff", ("#f0a95b", "#b9a1e6", "#6fc7b8"))


def quality_plot(report: Results, palette: Palette = LIGHT) -> bytes | None:
    """A PNG with a panel per plotted column, a line per series and the teacher dashed; None if there is nothing.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    panels = {
        name: column
        for name, column in report.columns.items()
        if column.plotted and any(_points(rows, name) for rows in report.series.values())
    }
    if not panels:
        return None
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install ofadiff[eval]") from error

    style = {
        "font.size": 10,
        "text.color": palette.ink,
        "axes.labelcolor": palette.ink,
        "axes.edgecolor": palette.grid,
        "axes.facecolor": palette.paper,
        "figure.facecolor": palette.paper,
        "xtick.color": palette.ink,
        "ytick.color": palette.ink,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "grid.color": palette.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(5.2 * len(panels), 3.7), layout="constrained")
        for axes, (name, column) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            _draw_panel(axes, report, name, column, palette)
            if axes.get_yscale() == "log":
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter("{x:g}")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _draw_panel(axes: Any, report: Results, name: str, column: Column, palette: Palette) -> None:
    baselines = iter(palette.baselines * len(report.series))
    heights = []
    for series, rows in report.series.items():
        if series == VARIANTS:  # more than one size has no place on the axis
            continue
        points = _points(rows, name)
        heights += [y for _, y in points]
        own = series == JOINT
        color = palette.joint if own else next(baselines)
        look = {"linewidth": 2.2, "markersize": 6.5} if own else {"linewidth": 1.6, "markersize": 4.5}
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=series, zorder=3 if own else 2, **look)
        for x, y, spread in _spreads(rows, name, column.spread):
            axes.errorbar(x, y, spread, fmt="none", ecolor=color, elinewidth=1.2, capsize=3)
    teacher = None if report.teacher is None else report.teacher.values.get(name)
    if teacher is not None:
        heights.append(teacher)
        axes.axhline(teacher, color=palette.ink, linestyle=(0, (5, 3)), linewidth=1.3, label="teacher", zorder=1)
    if min(heights) > 0 and max(heights) > LOG_SPAN * min(heights):
        axes.set_yscale("log")
    factor, unit = report.columns["params"].unit([x for rows in report.series.values() for x, _ in _points(rows, name)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / factor:g}")
    axes.set_xlabel(f"parameters of the denoiser, {unit}" if unit else "parameters of the denoiser")
    direction = f" ({column.better} is better)" if column.better else ""
    axes.set_title(f"{column.title}{direction}", loc="left", fontsize=11, pad=10)
    axes.margins(x=0.06, y=0.12)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)


def _spreads(rows: list[Row], name: str, spread: str) -> list[tuple[float, float, float]]:
    """Parameters, value and what stands behind its ± of the rows that have all three."""
    found = [[row.values.get(key) for key in ("params", name, spread)] for row in rows]
    return [(x, y, z) for x, y, z in found if x is not None and y is not None and z is not None]


def _points(rows: list[Row], name: str) -> list[tuple[float, float]]:
    """Parameters and value of the rows that have both."""
    pairs = [(row.values.get("params"), row.values.get(name)) for row in rows]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)
