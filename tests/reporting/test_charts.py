"""Metrics as curves: what is not a number leaves a gap, and nothing to draw draws nothing."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from report_material import reading

from dfadc.reporting.charts import LINES, MAX_READINGS, Panel, panel_svg, panels_of

READINGS = [reading(step, student_loss=1 / step) for step in range(1, 21)]


def test_every_metric_has_its_panel() -> None:
    panels = {panel.title: panel for panel in panels_of(READINGS)}
    assert list(panels) == [
        "Student loss",
        "Agreement on the probe",
        "Class entropy on the probe",
        "Generator loss",
        "Generator loss, unweighted terms",
        "Learning rates",
    ]
    assert panels["Student loss"].series["student"] == [1 / step for step in range(1, 21)]
    assert set(panels["Generator loss, unweighted terms"].series) == {"discrepancy", "balance"}
    assert set(panels["Learning rates"].series) == {"student", "generator"}


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "oops"], ids=str)
def test_what_is_not_a_number_leaves_a_gap(value: Any) -> None:
    panel = panels_of([*READINGS, reading(21, student_loss=value)])[0]
    assert math.isnan(panel.series["student"][-1])
    assert "<svg" in panel_svg(panel)


def test_agreeing_on_one_class_is_not_drawn() -> None:
    panel = panels_of([*READINGS, reading(21, agreement=1.0, collapse="collapsed: 1 class")])[1]
    assert panel.series["student = teacher"][-2] == 0.8
    assert math.isnan(panel.series["student = teacher"][-1])


def test_nothing_to_draw_draws_nothing() -> None:
    assert panels_of([]) == ()
    assert panels_of([{}]) == ()
    titles = [panel.title for panel in panels_of([reading(1, student_loss=math.nan, terms=None)])]
    assert "Student loss" not in titles
    assert "Generator loss, unweighted terms" not in titles


def test_a_long_run_is_thinned_evenly() -> None:
    panel = panels_of([reading(step) for step in range(1, 3 * MAX_READINGS)])[0]
    assert len(panel.steps) <= MAX_READINGS
    assert {b - a for a, b in zip(panel.steps, panel.steps[1:], strict=False)} == {3.0}


@pytest.mark.parametrize(
    "readings",
    [READINGS[:1], [reading(step, student_rate=0, generator_rate=0) for step in (1, 2)]],
    ids=["one reading", "rates that are all zero"],
)
def test_odd_runs_are_drawn(readings: list[dict[str, Any]]) -> None:
    for panel in panels_of(readings):
        assert "<svg" in panel_svg(panel)


def test_more_series_than_colours_are_all_drawn() -> None:
    series = {f"term {number}": [1.0, number] for number in range(2 * len(LINES))}
    svg = panel_svg(Panel("many", [1, 2], series))
    assert all(f">{name}<" in svg for name in series)


def test_a_panel_takes_its_colours_and_font_from_the_page_and_brings_nothing_else() -> None:
    svg = panel_svg(panels_of(READINGS)[5])
    root = ET.fromstring(svg.replace("xlink:href", "href"))  # noqa: S314 -- drawn here
    assert root.tag == "svg"
    assert set(root.attrib) == {"viewBox", "aria-hidden"}
    assert all(f"var(--{name})" in svg for name in ("ink", "line", "series-1", "series-2", "font"))
    assert not any(colour in svg for colour, _ in LINES)
    assert "http" not in svg
    assert "<style" not in svg
    assert "<metadata" not in svg


def test_two_panels_share_no_identifier() -> None:
    identifiers = [
        {element.get("id") for element in ET.fromstring(panel_svg(panel).replace("xlink:", "")).iter()} - {None}  # noqa: S314
        for panel in panels_of(READINGS)[:2]
    ]
    assert identifiers[0]
    assert not identifiers[0] & identifiers[1]


def test_the_same_metrics_give_the_same_bytes() -> None:
    panels = panels_of(READINGS)[4:]
    assert panel_svg(panels[0]) == panel_svg(panels[0])
