"""The report in GitHub's Markdown: the verdict, and everything behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfadc.reporting import rows
from dfadc.verification import summary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def render_markdown(report: Mapping[str, Any]) -> str:
    """The verification: verdict, tables and reasons."""
    lines = [f"# Verification: {summary.headline(report)}", ""]
    if networks := summary.network_rows(report):
        lines += table_lines(summary.NETWORK_COLUMNS, networks)
    lines += ["", _introduction(report), "", *table_lines(summary.COLUMNS, summary.summary_rows(report)), ""]
    columns, details = summary.detail_table(report)
    if details:
        lines += [*table_lines(columns, details), ""]
    if reasons := summary.reason_lines(report):
        lines += _section("Why", _list(reasons))
    lines += _section(
        "A export (against the fp32 student) and B distillation (against the teacher)",
        table_lines(summary.SOURCE_COLUMNS, summary.source_rows(report)),
    )
    coverage = [
        (name, str(value["n"]), f"{value['entropy']:.3f}", f"{value['num_empty']} of {len(value['counts'])}")
        for name, value in report["coverage"].items()
    ]
    columns = ("source", "n", "normalised class entropy", "classes never seen")
    lines += _section("C coverage (the teacher's classes)", table_lines(columns, coverage))
    if compared := summary.baseline_rows(report):
        title = f"D baseline ({report['baseline']['run']}, on its own samples)"
        lines += _section(title, table_lines(summary.BASELINE_COLUMNS, compared))
    if notes := report.get("notes"):
        lines += _section("Notes", _list(notes))
    return "\n".join(lines)


def render_details(report: Mapping[str, Any]) -> str:
    """Everything behind the verdict, to append to :func:`render_markdown`."""
    source, bound = rows.shown_source(report), rows.bound_note(report)
    lines = _section(
        f"Agreement by the teacher's class (fp32 student, source {source})",
        bound,
        table_lines(rows.CLASS_COLUMNS, rows.class_rows(report)),
    )
    if report.get("disagreements", {}).get("confusion"):
        title = f"Confusion (rows: teacher, columns: fp32 student, source {source})"
        lines += _section(title, bound, table_lines(*rows.confusion_table(report)))
    if "disagreements" in report:
        lines += _section("Worst disagreements", table_lines(rows.WORST_COLUMNS, rows.worst_rows(report)))
    if training := rows.training_rows(report):
        notes = [f"- {note}" for note in report["curves"]["notes"]]
        lines += _section("Last reading of the training", table_lines(("quantity", "value"), training), notes)
    if speeds := rows.speed_rows(report):
        lines += _section("Speed", rows.speed_conditions(report), table_lines(rows.SPEED_COLUMNS, speeds))
    files, recipe = rows.file_rows(report), rows.recipe_lines(report)
    lines += _section(
        "How it was made",
        table_lines(("", ""), rows.origin_rows(report)),
        table_lines(rows.FILE_COLUMNS, files) if files else "",
        ["```toml", *recipe, "```"] if recipe else "",
    )
    return "\n".join(lines)


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in GitHub's Markdown."""
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]


def _introduction(report: Mapping[str, Any]) -> str:
    """The samples, the intervals and the labelled data in a paragraph."""
    samples, gate = report["samples"], report["gate"]
    origin = ", ".join(f"{count} {name}" for name, count in samples["sources"].items())
    quantity, interval = "Agreement", "Wilson interval"
    if summary.is_dense(report):
        quantity, interval = "Agreement of pixels", "interval, from a bootstrap over images"
    elif summary.is_multilabel(report):
        quantity = "Agreement in every label of a sample"
    text = (
        f"{quantity} on {samples['n']} generated samples ({origin}; sha256 `{samples['sha256'][:12]}`), with its 95 % "
        f"{interval}: with the teacher on the samples of source *{gate['source']}*, with the fp32 student on all."
    )
    if report["accuracy"]:
        every = ", every label right," if summary.is_multilabel(report) else ""
        text += f" Accuracy{every} on {summary.labelled_size(report['accuracy'])}."
    if width := gate.get("boundary_width"):
        text += f" Pixels within {width} of a border between classes count neither with the teacher nor on masks."
    return text


def _section(title: str, *parts: str | list[str]) -> list[str]:
    """A heading and its parts, a blank line after each; an empty part is left out."""
    lines = [f"## {title}", ""]
    for part in filter(None, parts):
        lines += [*([part] if isinstance(part, str) else part), ""]
    return lines


def _list(entries: Sequence[str]) -> list[str]:
    return [f"- {_cell(entry)}" for entry in entries]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
