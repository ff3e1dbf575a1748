"""A report as rows of tables, as lines of reasons and as Markdown.

Rendering starts from the JSON, so a report can be rebuilt from a run folder with nothing else at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfadc.verification.agreement import ALL_SOURCES
from dfadc.verification.gate import STUDENT
from dfadc.verification.reasons import network_reasons
from dfadc.verification.report import LabelledAccuracy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COLUMNS = ("artifact", "verdict", "precision", "size", "agreement with teacher", "agreement with student", "accuracy")
NETWORK_COLUMNS = ("network", "architecture", "parameters", "FLOPs", "accuracy")
IOU_COLUMNS = ("network", "mean IoU with teacher", "mean IoU with student", "mean IoU on masks")
BASELINE_COLUMNS = ("network", "samples", "n", "before", "now", "lost", "gained", "McNemar p")
#: Key of a pair of answers -> what its samples are called in a table: those that a gate looks at, by key.
_JUDGED = {"gated": "judged", "accuracy": "labelled images"}
JUDGED = frozenset(_JUDGED.values())
SOURCE_COLUMNS = (
    "artifact",
    "comparison",
    "source",
    "n",
    "agreement",
    "ties",
    "top-5",
    "KL (nats)",
    "SQNR",
    "max error",
)


def network_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Teacher and student beside each other under ``NETWORK_COLUMNS``; none where the report knows no run."""
    run, labelled = report["run"], report["accuracy"] or {}
    networks = {who: run[who] for who in LabelledAccuracy._fields if "num_parameters" in run.get(who, {})}
    return [
        (
            who,
            network["architecture"],
            _of_teacher(networks, who, "num_parameters", 1, ""),
            _of_teacher(networks, who, "flops", 1e6, " M"),
            _percent(labelled.get(who), labelled.get(f"{who}_low"), labelled.get(f"{who}_high")),
        )
        for who, network in networks.items()
    ]


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of plain text for the fp32 student and each artifact, under ``COLUMNS``."""
    student = report["student"]
    labelled = report["accuracy"] or {}
    student_accuracy = _percent(labelled.get("student"), labelled.get("student_low"), labelled.get("student_high"))
    first = ("fp32 student", student["verdict"], "fp32", "–", _gated_percent(student), "–", student_accuracy)
    rows: list[tuple[str, ...]] = [first]
    for name, entry in report["artifacts"].items():
        export = entry["comparisons"]["A"].get(ALL_SOURCES, {})
        rows.append(
            (
                name,
                entry["verdict"],
                entry["precision"],
                _size(entry["size_bytes"]),
                _gated_percent(entry),
                _percent(export.get("agreement"), export.get("low"), export.get("high")),
                _percent(entry["accuracy"], entry["accuracy_low"], entry["accuracy_high"]),
            )
        )
    return rows


def is_dense(report: Mapping[str, Any]) -> bool:
    """Whether every pixel was answered: agreement is then of pixels, its interval from a bootstrap over images."""
    return "mean_iou" in report["student"]["comparisons"]["B"].get(ALL_SOURCES, {})


def iou_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """How the classes of dense answers overlap, under ``IOU_COLUMNS``; none where every image has one answer."""
    if not is_dense(report):
        return []
    source, labelled = report["gate"]["source"], report["accuracy"] or {}
    rows: list[tuple[str, ...]] = []
    if labelled:
        rows.append(("teacher", "–", "–", _iou(labelled.get("teacher_iou"))))
    student = report["student"]["comparisons"]["B"].get(source)
    rows.append(("fp32 student", _iou(student), "–", _iou(labelled.get("student_iou"))))
    for name, entry in report["artifacts"].items():
        found = entry["comparisons"]
        rows.append((name, _iou(found["B"].get(source)), _iou(found["A"].get(ALL_SOURCES)), _iou(entry.get("iou"))))
    return rows


def counted(labelled: Mapping[str, Any]) -> str:
    """What a report's accuracy was counted over."""
    return f"{labelled['n']:,} {labelled.get('unit', 'labelled images')}"


def source_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each artifact, comparison (A, B) and source."""
    entries = {"fp32 student": report["student"], **report["artifacts"]}
    return [
        (
            name,
            comparison,
            source,
            str(result["n"]),
            _percent(result["agreement"], result["low"], result["high"]),
            str(result["num_ties"]),
            "–" if result["top5"] is None else f"{result['top5']:.2%}",
            _number(result["kl"], ".4f"),
            "exact" if result["max_logit_error"] == 0 else _number(result["sqnr_db"], ".1f", " dB"),
            _number(result["max_logit_error"], ".2g"),
        )
        for name, entry in entries.items()
        for comparison in ("A", "B")
        for source, result in entry["comparisons"].get(comparison, {}).items()
    ]


def baseline_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Comparison D under ``BASELINE_COLUMNS``; none where nothing was held against a baseline."""
    networks = (report.get("baseline") or {}).get("networks", {})
    return [
        (
            "fp32 student" if name == STUDENT else name,
            _JUDGED.get(source, source),
            str(pairs["n"]),
            *("–" if pairs[when] is None else f"{pairs[when]:.2%}" for when in ("before", "after")),
            str(pairs["lost"]),
            str(pairs["gained"]),
            f"{pairs['p_value']:.2g}",
        )
        for name, compared in networks.items()
        for source, pairs in {**compared["agreement"], "accuracy": compared["accuracy"]}.items()
        if pairs is not None
    ]


def reason_lines(report: Mapping[str, Any]) -> list[str]:
    """Every reason for a verdict other than PASS, those of a network with its name and the gate's verdict."""
    return [*report["reasons"], *(f"{name} {verdict}: {why}" for name, verdict, why in network_reasons(report))]


def headline(report: Mapping[str, Any]) -> str:
    """The verdict, and how many artifacts ran where it is not all; earlier versions wrote the verdict alone."""
    text: str = report.get("headline") or report["verdict"]
    return text


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report in GitHub's Markdown."""
    samples, source = report["samples"], report["gate"]["source"]
    origin = ", ".join(f"{count} {name}" for name, count in samples["sources"].items())
    what, interval = ("Agreement of pixels", "interval, from a bootstrap over images")
    if not is_dense(report):
        what, interval = "Agreement", "Wilson interval"
    intro = (
        f"{what} on {samples['n']} generated samples ({origin}; sha256 `{samples['sha256'][:12]}`), with its 95 % "
        f"{interval}: with the teacher on the samples of source *{source}*, with the fp32 student on all."
    )
    if report["accuracy"]:
        intro += f" Accuracy on {counted(report['accuracy'])}."
    if width := report["gate"].get("boundary_width"):
        intro += f" Pixels within {width} of a border between classes count neither with the teacher nor on masks."
    lines = [
        f"# Verification: {headline(report)}",
        "",
        *(table_lines(NETWORK_COLUMNS, networks) if (networks := network_rows(report)) else []),
        "",
        intro,
        "",
        *table_lines(COLUMNS, summary_rows(report)),
        "",
    ]
    if overlaps := iou_rows(report):
        lines += [*table_lines(IOU_COLUMNS, overlaps), ""]
    reasons = reason_lines(report)
    if reasons:
        lines += ["## Why", "", *(f"- {_cell(reason)}" for reason in reasons), ""]
    lines += ["## A export (against the fp32 student) and B distillation (against the teacher)", ""]
    lines += [*table_lines(SOURCE_COLUMNS, source_rows(report)), ""]
    lines += ["## C coverage (the teacher's classes)", ""]
    coverage_rows = [
        (name, str(value["n"]), f"{value['entropy']:.3f}", f"{value['num_empty']} of {len(value['counts'])}")
        for name, value in report["coverage"].items()
    ]
    lines += [*table_lines(("source", "n", "normalised class entropy", "classes never seen"), coverage_rows), ""]
    if compared := baseline_rows(report):
        lines += [f"## D baseline ({report['baseline']['run']}, on its own samples)", ""]
        lines += [*table_lines(BASELINE_COLUMNS, compared), ""]
    if notes := report.get("notes"):
        lines += ["## Notes", "", *(f"- {_cell(note)}" for note in notes), ""]
    return "\n".join(lines)


def _gated_percent(entry: Mapping[str, Any]) -> str:
    return _percent(entry["agreement"], entry["agreement_low"], entry["agreement_high"])


def _percent(rate: float | None, low: float | None, high: float | None) -> str:
    if rate is None or low is None or high is None:
        return "–"
    return f"{rate:.2%} [{100 * low:.2f}, {100 * high:.2f}]"


def _iou(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else _percent(found["mean_iou"], found["mean_iou_low"], found["mean_iou_high"])


def _of_teacher(networks: Mapping[str, Any], who: str, quantity: str, scale: float, unit: str) -> str:
    """A quantity of one network, with its share of the teacher's where it is not the teacher."""
    value, teacher = networks[who][quantity], networks.get("teacher", {}).get(quantity)
    if value is None:
        return "–"
    share = f" ({value / teacher:.1%})" if who != "teacher" and teacher else ""
    shown = value / scale
    return f"{shown:,.0f}{unit}{share}" if shown >= 10 else f"{shown:.3g}{unit}{share}"


def _number(value: float | None, style: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{style}}{unit}"


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "–"
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in GitHub's Markdown."""
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
