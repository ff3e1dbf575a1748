"""The report as one HTML page: no script, no network, every picture inside it.

The page is rendered from the JSON document; samples and curves are passed separately, for their pictures.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from dfadc.reporting import rows
from dfadc.reporting.charts import panel_svg
from dfadc.reporting.pictures import (
    GRID_SIDE,
    SINGLE_SIDE,
    displayable,
    legend,
    png_uri,
    samples_by_class,
    worst_scenes,
)
from dfadc.verification import summary
from dfadc.verification.pixel_samples import DenseSampleSet
from dfadc.verification.samples import SampleSet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jinja2 import Environment

    from dfadc.reporting.charts import Panel
    from dfadc.verification.pixel_samples import Samples

#: Verdict -> (its sign, its style). The word always stands beside the sign.
VERDICTS = {"PASS": ("✓", "pass"), "FAIL": ("✗", "fail"), "NOT RUN": ("–", "absent"), "NOT GATED": ("○", "ungated")}
COMPARISONS = {"A": "export: against the fp32 student", "B": "distillation: against the teacher"}


class Tile(NamedTuple):
    """One sample: address of its picture, description, and agreement of teacher and student."""

    uri: str
    description: str
    agrees: bool


class ConfusionCell(NamedTuple):
    """Number of one pair of predictions, and the strength of its shade in [0, 1]."""

    number: int
    strength: float
    agrees: bool
    meaning: str


def render_html(report: Mapping[str, Any], *, samples: Samples | None, panels: Sequence[Panel]) -> str:
    """The page of a completed report as text; without pictures of samples if they are gone.

    The same report, samples and curves of the training give the same bytes.
    """
    from markupsafe import Markup  # noqa: PLC0415 - as jinja2 below

    classified = samples if isinstance(samples, SampleSet) else None
    teacher, student = (report["run"].get(role, {}).get("architecture") for role in ("teacher", "student"))
    template = _environment().get_template("report.html.jinja")
    page = template.render(
        report=report,
        rows=rows,
        class_name=summary.class_name,
        verdicts=VERDICTS,
        headline=summary.headline(report),
        summary=f"{student}, distilled from {teacher} without one image of training data." if teacher else "",
        facts=list(_facts(report)),
        reasons=summary.reason_lines(report),
        notes=report.get("notes", []),
        networks=(summary.NETWORK_COLUMNS, summary.network_rows(report)),
        artifacts=_artifact_table(report),
        checks=[
            (name, check["verdict"], check["message"])
            for name, entry in summary.judged_networks(report).items()
            for check in entry["checks"]
        ],
        baseline=report.get("baseline"),
        pairs=(summary.BASELINE_COLUMNS, summary.baseline_rows(report)),
        comparisons=COMPARISONS,
        by_source={name: _pivot(report, name) for name in COMPARISONS},
        sources=(summary.SOURCE_COLUMNS, summary.source_rows(report)),
        confusion=list(_confusion(report)),
        worst=_worst_tiles(report, classified),
        grid=_grid(report, classified),
        dense=summary.is_dense(report),
        labelled_size=summary.labelled_size(report["accuracy"]) if report["accuracy"] else "",
        multilabel=summary.is_multilabel(report),
        details=summary.detail_table(report),
        scenes=worst_scenes(samples) if isinstance(samples, DenseSampleSet) else {},
        legend=legend(len(report["coverage"]["all"]["counts"])),
        normalised=samples is not None and not samples.contract.has_pixels,
        panels=[(panel, Markup(panel_svg(panel))) for panel in panels],  # noqa: S704 - drawn here from numbers
    )
    return f"{page.strip()}\n"


@functools.cache
def _environment() -> Environment:
    # Only a run's report is rendered: commands that render none need no jinja2.
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        loader=PackageLoader("dfadc.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda rate: "–" if rate is None else f"{rate:.1%}"
    # A length in CSS.
    environment.filters["points"] = lambda rate: f"{100 * rate:.2f}"
    return environment


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Key figures at the top of the page: name, value, remark."""
    source, (_, _, _, _, agreement, _, accuracy) = report["gate"]["source"], summary.summary_rows(report)[0]
    yield ("agreement with the teacher", *_value_and_interval(agreement, f"generated samples, source {source}"))
    if report["accuracy"]:
        value, remark = _value_and_interval(accuracy, f"teacher {report['accuracy']['teacher']:.2%}")
        yield "accuracy", value, remark
    sizes = {row[0]: row[2] for row in summary.network_rows(report)}
    if "student" in sizes:
        value, _, share = sizes["student"].partition(" ")
        yield "parameters", value, f"{share.strip('()')} of the teacher's" if share else ""
    verdicts = Counter(entry["verdict"] for entry in report["artifacts"].values())
    counts = [f"{verdicts[word]} {word}" for word in VERDICTS if verdicts[word]]
    yield "artifacts", ", ".join(counts) or "none", ""


def _value_and_interval(text: str, remark: str) -> tuple[str, str]:
    """A rate with its interval as :func:`summary.summary_rows` writes it, in two parts, and a remark."""
    value, bracket, interval = text.partition(" [")
    return value, f"[{interval}; {remark}" if bracket else remark


def _artifact_table(report: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The summary, with a column of latencies if they were measured."""
    table = summary.summary_rows(report)
    latency = {row[0]: row[1] for row in rows.speed_rows(report)}
    if not latency:
        return summary.COLUMNS, table
    return (*summary.COLUMNS, "latency"), [(*row, latency.get(row[0], "–")) for row in table]


def _pivot(report: Mapping[str, Any], comparison: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One comparison's agreement: a row for each artifact, a column for each source."""
    cells: dict[str, dict[str, str]] = {}
    for name, which, source, n, agreement, *_ in summary.source_rows(report):
        if which == comparison:
            cells.setdefault(name, {})[source] = agreement if n != "0" else "no samples"
    sources = list(dict.fromkeys(source for row in cells.values() for source in row))
    table = [(name, *(row.get(source, "–") for source in sources)) for name, row in cells.items()]
    return ("artifact", *sources), table


def _confusion(report: Mapping[str, Any]) -> Iterator[tuple[str, list[ConfusionCell]]]:
    """One row for each listed class of the teacher. Agreement and confusion are shaded on scales of their own."""
    if not report.get("disagreements", {}).get("n"):
        return
    _, table = rows.confusion_table(report)
    shares = []
    for _, *texts in table:
        counts = [int(text) for text in texts]
        shares.append([count / max(1, sum(counts)) for count in counts])
    most = max((share for i, row in enumerate(shares) for j, share in enumerate(row) if i != j), default=0.0)
    labels = [label for label, *_ in table] + ["another class"]
    for i, (label, *texts) in enumerate(table):
        yield (
            label,
            [
                ConfusionCell(
                    int(text),
                    shares[i][j] if i == j else shares[i][j] / most if most else 0.0,
                    agrees=i == j,
                    meaning=f"teacher {label}, student {labels[j]}: {text}",
                )
                for j, text in enumerate(texts)
            ],
        )


def _worst_tiles(
    report: Mapping[str, Any], samples: SampleSet | None
) -> dict[str, list[tuple[Mapping[str, Any], Tile | None]]]:
    """Source -> its worst disagreements, each with its picture if the samples are there."""
    tiles: dict[str, list[tuple[Mapping[str, Any], Tile | None]]] = {}
    for entry in report.get("disagreements", {}).get("worst", ()):
        tile = None if samples is None else _tile(report, samples, entry["index"], SINGLE_SIDE)
        tiles.setdefault(entry["source"], []).append((entry, tile))
    return tiles


def _grid(report: Mapping[str, Any], samples: SampleSet | None) -> list[tuple[Mapping[str, Any], list[Tile]]]:
    """Each listed class with some of its samples."""
    if samples is None or not len(samples):
        return []
    classes = {entry["class"]: entry for entry in rows.listed_classes(report)}
    chosen = samples_by_class(samples, rows.shown_source(report), list(classes))
    return [
        (classes[index], [_tile(report, samples, int(at), GRID_SIDE) for at in indices])
        for index, indices in chosen.items()
    ]


def _tile(report: Mapping[str, Any], samples: SampleSet, index: int, side: int) -> Tile:
    one = slice(index, index + 1)
    teacher, student = (samples.predict(logits[one])[0] for logits in (samples.teacher_logits, samples.student_logits))
    named = [_prediction(report, found) for found in (teacher, student)]
    description = f"generated sample {index}: teacher {named[0]}, student {named[1]}"
    return Tile(png_uri(displayable(samples.images[one])[0], side), description, bool((teacher == student).all()))


def _prediction(report: Mapping[str, Any], found: Any) -> str:
    """A predicted class, or the labels that are on; found: () or (K,)."""
    if found.min() < 0:
        return "not finite"
    if not found.ndim:
        return summary.class_name(report, int(found))
    names = [summary.class_name(report, 2 * label + 1).removesuffix(": on") for label in found.nonzero()[0].tolist()]
    return ", ".join(names) or "no label"
