"""A report as rows of tables and lines of reasons. Standard library only.

Rendering starts from the JSON, so a report can be rebuilt from a run folder with nothing else at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfadc.verification.agreement import ALL_SOURCES
from dfadc.verification.gate import STUDENT
from dfadc.verification.report import LabelledAccuracy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

COLUMNS = ("artifact", "verdict", "precision", "size", "agreement with teacher", "agreement with student", "accuracy")
NETWORK_COLUMNS = ("network", "architecture", "parameters", "FLOPs", "accuracy")
IOU_COLUMNS = ("network", "mean IoU with teacher", "mean IoU with student", "mean IoU on masks")
LABEL_COLUMNS = (
    *("network", "label agreement with teacher", "lowest of a label", "label agreement with student"),
    "label accuracy",
)
BASELINE_COLUMNS = ("network", "samples", "n", "before", "now", "lost", "gained", "McNemar p")
STUDENT_NAME = "fp32 student"
#: Key of paired predictions that a gate judges -> name of their samples in a table.
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
    """Rows for teacher and student under ``NETWORK_COLUMNS``; none if the report is not of a run."""
    run = report["run"]
    networks = {role: run[role] for role in LabelledAccuracy._fields if "num_parameters" in run.get(role, {})}
    return [
        (
            role,
            network["architecture"],
            _with_share(networks, role, "num_parameters", 1, ""),
            _with_share(networks, role, "flops", 1e6, " M"),
            _interval(report["accuracy"], role),
        )
        for role, network in networks.items()
    ]


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of plain text for the fp32 student and each artifact, under ``COLUMNS``."""
    student = report["student"]
    agreement, accuracy = _interval(student, "agreement"), _interval(report["accuracy"], "student")
    return [
        (STUDENT_NAME, student["verdict"], "fp32", "–", agreement, "–", accuracy),
        *(
            (
                name,
                entry["verdict"],
                entry["precision"],
                _size(entry["size_bytes"]),
                _interval(entry, "agreement"),
                _agreement(entry["comparisons"]["A"].get(ALL_SOURCES)),
                _interval(entry, "accuracy"),
            )
            for name, entry in report["artifacts"].items()
        ),
    ]


def headline(report: Mapping[str, Any]) -> str:
    """The verdict, and how many artifacts ran if not all did; earlier versions wrote the verdict alone."""
    return str(report.get("headline") or report["verdict"])


def judged_networks(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> entry of the fp32 student and every artifact."""
    return {STUDENT_NAME: report["student"], **report["artifacts"]}


def is_dense(report: Mapping[str, Any]) -> bool:
    """True for segmentation: agreement is then of pixels, its interval from a bootstrap over images."""
    return "mean_iou" in report["student"]["comparisons"]["B"].get(ALL_SOURCES, {})


def is_multilabel(report: Mapping[str, Any]) -> bool:
    """True where an image has several labels: agreement is then of all of them."""
    return bool(report.get("task") == "multilabel")


def class_name(report: Mapping[str, Any], index: int) -> str:
    """The contract's name of a class, or its number; of several labels that of a label, and its state."""
    names = report["class_names"]
    if not is_multilabel(report):
        return f"class {index}" if names is None else str(names[index])
    label, is_on = divmod(index, 2)
    return f"{f'label {label}' if names is None else names[label]}: {'on' if is_on else 'off'}"


def detail_table(report: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows behind the summary: mean IoU of segmentation, rates of single labels; none for one class."""
    if is_multilabel(report):
        return LABEL_COLUMNS, label_rows(report)
    return IOU_COLUMNS, iou_rows(report)


def label_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rates of labels, rather than of all labels of a sample, under ``LABEL_COLUMNS``.

    The lowest is that of the label and state, on or off, with the lowest bound.
    """
    source, labelled = report["gate"]["source"], report["accuracy"] or {}
    rows: list[tuple[str, ...]] = []
    if labelled:
        rows.append(("teacher", "–", "–", "–", _label_accuracy(labelled.get("teacher_labels"))))
    for name, entry in judged_networks(report).items():
        export, distillation = entry["comparisons"].get("A", {}), entry["comparisons"].get("B", {})
        states = distillation.get(source, {}).get("per_class", ())
        worst = min((state for state in states if state["n"]), key=lambda state: state["low"], default=None)
        least = "–" if worst is None else f"{class_name(report, worst['class'])} {_agreement(worst)}"
        right = labelled.get("student_labels") if entry is report["student"] else entry.get("labels")
        as_student = _label_share(export.get(ALL_SOURCES, {}).get("per_class", ()))
        rows.append((name, _label_share(states), least, as_student, _label_accuracy(right)))
    return rows


def iou_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Mean IoU of segmentation under ``IOU_COLUMNS``; none for classification."""
    if not is_dense(report):
        return []
    source, labelled = report["gate"]["source"], report["accuracy"] or {}
    rows: list[tuple[str, ...]] = []
    if labelled:
        rows.append(("teacher", "–", "–", _interval(labelled.get("teacher_iou"), "mean_iou")))
    for name, entry in judged_networks(report).items():
        export, distillation = entry["comparisons"].get("A", {}), entry["comparisons"]["B"]
        on_masks = labelled.get("student_iou") if entry is report["student"] else entry.get("iou")
        scores = (distillation.get(source), export.get(ALL_SOURCES), on_masks)
        rows.append((name, *(_interval(score, "mean_iou") for score in scores)))
    return rows


def labelled_size(labelled: Mapping[str, Any]) -> str:
    """Number and unit of the labelled samples behind a report's accuracy."""
    return f"{labelled['n']:,} {labelled.get('unit', 'labelled images')}"


def source_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each artifact, comparison (A, B) and source."""
    return [
        (
            name,
            comparison,
            source,
            str(result["n"]),
            _agreement(result),
            str(result["num_ties"]),
            "–" if result["top5"] is None else f"{result['top5']:.2%}",
            _number(result["kl"], ".4f"),
            "exact" if result["max_logit_error"] == 0 else _number(result["sqnr_db"], ".1f", " dB"),
            _number(result["max_logit_error"], ".2g"),
        )
        for name, entry in judged_networks(report).items()
        for comparison in ("A", "B")
        for source, result in entry["comparisons"].get(comparison, {}).items()
    ]


def baseline_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Comparison D under ``BASELINE_COLUMNS``; none without a baseline."""
    networks = (report.get("baseline") or {}).get("networks", {})
    return [
        (
            STUDENT_NAME if name == STUDENT else name,
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


def network_reasons(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each network's reasons for not being PASS: its name, the verdict of the gate that gives the reason, the reason.

    Every artifact fails with its student: the reasons that they share are given once, at the student.
    """
    student = report["student"]
    for name, entry in judged_networks(report).items():
        verdicts = {check["message"]: check["verdict"] for check in entry["checks"]}
        for reason in entry["reasons"]:
            if entry is student or reason not in student["reasons"]:
                yield name, verdicts.get(reason, entry["verdict"]), reason


def reason_lines(report: Mapping[str, Any]) -> list[str]:
    """Every reason for a verdict other than PASS, those of a network with its name and the gate's verdict."""
    return [*report["reasons"], *(f"{name} {verdict}: {reason}" for name, verdict, reason in network_reasons(report))]


def _agreement(result: Mapping[str, Any] | None) -> str:
    """The agreement of one comparison on one source."""
    return _interval(result, "agreement", bounds="")


def _interval(values: Mapping[str, Any] | None, name: str, *, bounds: str | None = None) -> str:
    """A rate with its bounds, which have its name before theirs; a dash if one of the three was not measured."""
    prefix = f"{name}_" if bounds is None else bounds
    rate, low, high = ((values or {}).get(key) for key in (name, f"{prefix}low", f"{prefix}high"))
    if rate is None or low is None or high is None:
        return "–"
    return f"{rate:.2%} [{100 * low:.2f}, {100 * high:.2f}]"


def _label_share(states: Sequence[Mapping[str, Any]]) -> str:
    """Share of all labels of all samples that agree."""
    total = sum(state["n"] for state in states)
    return f"{sum(state['k'] for state in states) / total:.2%}" if total else "–"


def _label_accuracy(labels: Mapping[str, Any] | None) -> str:
    return "–" if labels is None or labels["mean"] is None else f"{labels['mean']:.2%}"


def _with_share(networks: Mapping[str, Any], role: str, quantity: str, scale: float, unit: str) -> str:
    """A quantity of one network, with its share of the teacher's unless it is the teacher."""
    value, teacher = networks[role][quantity], networks.get("teacher", {}).get(quantity)
    if value is None:
        return "–"
    share = f" ({value / teacher:.1%})" if role != "teacher" and teacher else ""
    shown = value / scale
    return f"{shown:,.0f}{unit}{share}" if shown >= 10 else f"{shown:.3g}{unit}{share}"


def _number(value: float | None, style: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{style}}{unit}"


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "–"
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"
