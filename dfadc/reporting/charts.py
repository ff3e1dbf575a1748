"""A run's metrics as curves: small SVG panels for the page."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

#: Most readings that are drawn; of more, as many evenly over the run.
MAX_READINGS = 2000
#: Colours that colour-blind readers tell apart (Okabe and Ito, 2008), each with a line style of its own.
LINES = (
    ("#0072b2", "-"),
    ("#d55e00", (0, (5, 1.5))),
    ("#009e73", (0, (1, 1))),
    ("#cc79a7", (0, (6, 1.5, 1, 1.5))),
    ("#7d6608", (0, (3, 1, 1, 1, 1, 1))),
)
INK, GRID = "#454f5b", "#d0d7de"
_LEGEND_COLUMNS = 3
#: Steps between labels on an axis, at most: what a panel costs to draw is its labels.
_TICKS = 4
#: Margins of a panel, wide enough for its labels: letting matplotlib measure them takes three times as long.
_MARGINS = {"left": 0.14, "right": 0.97, "bottom": 0.18, "top": 0.74}


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart.

    Args:
        title: quantity, with the unit.
        steps: (N,) horizontal.
        series: name -> (N,) values; NaN leaves a gap.
        share: the values lie in [0, 1].
        logarithmic: they span orders of magnitude.
    """

    title: str
    steps: Sequence[float]
    series: Mapping[str, Sequence[float]]
    share: bool = False
    logarithmic: bool = False


def panels_of(readings: Sequence[Mapping[str, Any]]) -> tuple[Panel, ...]:
    """Panels of the lines of metrics.jsonl; none for a quantity without values.

    A value that is absent, null, NaN or infinite is not drawn.
    """
    if not readings:
        return ()
    chosen = readings[:: math.ceil(len(readings) / MAX_READINGS)]
    steps = _values(chosen, "step")
    # While the generator draws one class, agreement on it means nothing.
    valid = [{} if reading.get("collapse") else reading for reading in chosen]
    terms = [reading.get("terms") or {} for reading in chosen]
    names = list(dict.fromkeys(name for reading in terms for name in reading))
    panels = (
        Panel("Student loss", steps, {"student": _values(chosen, "student_loss")}),
        Panel("Agreement on the probe", steps, {"student = teacher": _values(valid, "agreement")}, share=True),
        Panel("Class entropy on the probe", steps, {"teacher's classes": _values(chosen, "class_entropy")}, share=True),
        Panel("Generator loss", steps, {"generator": _values(chosen, "generator_loss")}),
        Panel("Generator loss, unweighted terms", steps, {name: _values(terms, name) for name in names}),
        Panel(
            "Learning rates",
            steps,
            {"student": _values(chosen, "student_rate"), "generator": _values(chosen, "generator_rate")},
            logarithmic=True,
        ),
    )
    return tuple(panel for panel in panels if any(math.isfinite(x) for values in panel.series.values() for x in values))


def panel_svg(panel: Panel) -> str:
    """One panel as an ``<svg>`` element whose colours are the page's own: ``--ink``, ``--line``, ``--series-1``, ..."""
    from matplotlib import rc_context  # noqa: PLC0415 - only a run's report draws
    from matplotlib.figure import Figure  # noqa: PLC0415

    stream = io.StringIO()
    # Text stays text; the salt keeps identifiers the same in every run and different in every panel.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(4.4, 2.7))
        _draw(figure.subplots(gridspec_kw=_MARGINS), panel)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    opening, hidden = r'(?s)^.*?<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">'
    svg = re.sub(opening, hidden, stream.getvalue())
    svg = re.sub(r'(?s)<style.*?</style>|(?<=<g) id="[^"]*"', "", svg)
    names = {INK: "ink", GRID: "line"} | {colour: f"series-{i}" for i, (colour, _) in enumerate(LINES, start=1)}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)


def _draw(axes: Axes, panel: Panel) -> None:
    marker = "o" if len(panel.steps) == 1 else None
    for (name, values), (colour, style) in zip(panel.series.items(), cycle(LINES), strict=False):
        axes.plot(panel.steps, values, color=colour, linestyle=style, linewidth=1.4, label=name, marker=marker)
    if panel.share:
        axes.set_ylim(-0.03, 1.03)
    elif panel.logarithmic and (peaks := [_peak(values) for values in panel.series.values() if _peak(values) > 0]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        # A schedule that ends at 0 would stretch the axis down to its last step.
        axes.set_ylim(bottom=min(peaks) / 1e4)
        axes.minorticks_off()
    else:
        axes.locator_params(axis="y", nbins=_TICKS)
    axes.locator_params(axis="x", nbins=_TICKS, integer=True)
    if len(panel.series) > 1:  # the title names a single line
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            borderaxespad=0.2,
            ncols=_LEGEND_COLUMNS,
            columnspacing=1.2,
            handlelength=2.6,
            fontsize=8,
            frameon=False,
            labelcolor=INK,
        )
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)


def _peak(values: Sequence[float]) -> float:
    return max(filter(math.isfinite, values), default=0.0)


def _values(readings: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = [reading.get(name) for reading in readings]
    return [float(x) if isinstance(x, int | float) and math.isfinite(x) else math.nan for x in values]
