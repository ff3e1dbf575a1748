"""Rows of a report's tables behind the verdict: classes, samples, training, speed, origin.

They come from the JSON document, as those of :mod:`dfadc.verification.summary` do; a part that the document lacks has
no rows.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dfadc.reporting.disagreements import MAX_CLASSES, listed_per_class
from dfadc.verification import summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CLASS_COLUMNS = ("teacher's class", "n", "agreement", "")
WORST_COLUMNS = ("sample", "source", "teacher", "confidence", "student", "confidence", "student on teacher's class")
SPEED_COLUMNS = ("network", "latency", "p95", "speed-up", "images/s", "device")
FILE_COLUMNS = ("artifact", "sha256", "made from", "with", "notes")


def listed_classes(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Comparison B of the fp32 student by class, on the source that the confusion is counted over."""
    result = report["student"]["comparisons"]["B"].get(shown_source(report))
    return [] if result is None else listed_per_class(result["per_class"])


def shown_source(report: Mapping[str, Any]) -> str:
    """The source whose samples are listed class by class."""
    return str(report.get("disagreements", {}).get("source", report["gate"]["source"]))


def bound_note(report: Mapping[str, Any]) -> str:
    """Remark that not every class is listed; empty if every one is."""
    num_classes, listed = len(report["coverage"]["all"]["counts"]), len(listed_classes(report))
    plural = "states of labels" if summary.is_multilabel(report) else "classes"
    return f"The {listed} of {num_classes} {plural} with most disagreements." if num_classes > MAX_CLASSES else ""


def class_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a listed class under ``CLASS_COLUMNS``."""
    return [
        (
            summary.class_name(report, entry["class"]),
            str(entry["n"]),
            f"{entry['agreement']:.1%} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]" if entry["n"] else "–",
            "too few" if entry["too_few"] else "",
        )
        for entry in listed_classes(report)
    ]


def worst_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a disagreement under ``WORST_COLUMNS``."""
    return [
        (
            str(entry["index"]),
            entry["source"],
            summary.class_name(report, entry["teacher"]),
            f"{entry['teacher_confidence']:.1%}",
            summary.class_name(report, entry["student"]),
            f"{entry['student_confidence']:.1%}",
            f"{entry['student_on_teachers_class']:.1%}",
        )
        for entry in report.get("disagreements", {}).get("worst", ())
    ]


def speed_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a network that was timed under ``SPEED_COLUMNS``."""
    networks = (report.get("bench") or {}).get("networks", {})
    return [
        (
            name,
            f"{speed['latency_ms']:.2f} ms",
            f"{speed['latency_p95_ms']:.2f} ms",
            "–" if speed["speedup"] is None else f"{speed['speedup']:.2f}x",
            f"{speed['throughput']:,.0f}",
            speed["device"],
        )
        for name, speed in networks.items()
        if "latency_ms" in speed
    ]


def speed_conditions(report: Mapping[str, Any]) -> str:
    """Machine, threads and batch of ``speed_rows``."""
    bench = report["bench"]
    return (
        f"Latency: median and 95th percentile of one image; throughput at {bench['batch']} images; "
        f"threads: {bench['threads']}; {bench['machine']}; speed-up against the teacher."
    )


def origin_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Command, recipe, networks, versions and machine of the run; without what was not recorded."""
    run = report["run"]
    teacher, student, recipe = run.get("teacher") or {}, run.get("student") or {}, run.get("recipe") or {}
    rows = {
        "run": run.get("name"),
        "command": run.get("command"),
        "started": run.get("started"),
        "took": None if run.get("seconds") is None else f"{run['seconds']:,.0f} s",
        "recipe": f"{recipe['name']}: {recipe['steps']:,} steps of {recipe['batch_size']} images" if recipe else None,
        "seed": run.get("seed"),
        "device": run.get("device"),
        "precision": run.get("precision"),
        "threads": run.get("threads"),
        "teacher": _network(teacher),
        "teacher's sha256": teacher.get("sha256"),
        "student": _network(student),
        "samples' sha256": report["samples"]["sha256"],
        "versions": ", ".join(f"{name} {v}" for name, v in (run.get("versions") or {}).items() if v is not None),
        "Python": run.get("python"),
        "platform": run.get("platform"),
        "commit of dfadc": run.get("git_commit"),
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def file_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row an artifact's file under ``FILE_COLUMNS``."""
    files = report["run"].get("artifacts") or []
    names = {file["sha256"]: _file_name(file) for file in files}
    return [
        (
            _file_name(file),
            file["sha256"],
            "student" if file["parent_sha256"] is None else names.get(file["parent_sha256"], file["parent_sha256"]),
            ", ".join(f"{tool} {version}" for tool, version in file["tool_versions"].items()),
            "; ".join(file["notes"]),
        )
        for file in files
    ]


def recipe_lines(report: Mapping[str, Any]) -> list[str]:
    """The resolved recipe, a ``path.to.field = value`` a line, as ``--set`` takes it."""
    return list(_flatten(report["run"].get("recipe") or {}, ""))


def training_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The quantities of the last line of metrics.jsonl."""
    last = (report.get("curves") or {}).get("last") or {}
    shown = {name: value for name, value in last.items() if name not in {"steps", "seconds_left"}}
    return [(name.replace("_", " "), "–" if value is None else f"{value:g}") for name, value in shown.items()]


def confusion_table(report: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the confusion; with a column of other classes only if there are others."""
    disagreements = report["disagreements"]
    labels = tuple(summary.class_name(report, index) for index in disagreements["classes"])
    width = len(labels) + has_other_classes(report)
    pairs = zip(labels, disagreements["confusion"], strict=True)
    rows = [(label, *map(str, counts[:width])) for label, counts in pairs]
    return ("", *labels, "other")[: width + 1], rows


def has_other_classes(report: Mapping[str, Any]) -> bool:
    """True if the confusion leaves classes out."""
    return len(report["disagreements"]["classes"]) < len(report["coverage"]["all"]["counts"])


def _network(network: Mapping[str, Any]) -> str | None:
    if "architecture" not in network:
        return None
    return f"{network['architecture']}, {network['num_parameters']:,} parameters"


def _file_name(file: Mapping[str, Any]) -> str:
    return str(file["file"]).rpartition("/")[2]


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} = {json.dumps(value, ensure_ascii=False)}"
