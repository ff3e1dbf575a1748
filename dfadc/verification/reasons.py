"""Reasons behind a report's verdict, network by network. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def network_reasons(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each network's reasons for not being PASS: its name, the verdict of the gate that gives the reason, the reason.

    Every artifact fails with its student: what they share is said once, at the student.
    """
    student = report["student"]
    for name, entry in {"fp32 student": student, **report["artifacts"]}.items():
        verdicts = {check["message"]: check["verdict"] for check in entry["checks"]}
        for reason in entry["reasons"]:
            if entry is student or reason not in student["reasons"]:
                yield name, verdicts.get(reason, entry["verdict"]), reason
