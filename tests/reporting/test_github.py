"""Annotations of GitHub Actions: they name the network, the verdict and the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from report_material import judged_report, passing

from dfadc.reporting.github import annotation, annotation_lines
from dfadc.verification.summary import reason_lines

if TYPE_CHECKING:
    from dfadc.verification.report import Report


@pytest.fixture
def report() -> Report:
    return judged_report()


def test_annotations_name_the_network_and_the_reason(report: Report) -> None:
    lines = list(annotation_lines(report))
    assert lines[0] == "::error title=verification%3A FAIL::failed: student.int8.onnx"
    assert any(line.startswith("::error title=student.int8.onnx%3A FAIL::A export: ") for line in lines)
    assert "::warning title=student.rtx.engine%3A NOT RUN::no NVIDIA GPU & none at all" in lines
    assert "%25 [" not in lines[-1]
    assert all("\n" not in line for line in lines)


def test_what_passes_is_not_annotated(report: Report) -> None:
    report = passing(report)
    del report["artifacts"]["student.rtx.engine"]
    assert list(annotation_lines(report)) == []


def test_a_remark_on_what_is_not_gated_is_no_error_of_a_network_that_fails(report: Report) -> None:
    remark = {"comparison": "D", "gate": "drop", "verdict": "NOT GATED", "message": "D baseline: not known"}
    entry = report["artifacts"]["student.int8.onnx"]
    entry["checks"].append(remark)
    entry["reasons"].append(remark["message"])
    lines = [line for line in annotation_lines(report) if "student.int8.onnx" in line and "A export" in line]
    assert lines
    assert all(line.startswith("::error title=student.int8.onnx%3A FAIL::") for line in lines)
    assert "::warning title=student.int8.onnx%3A NOT GATED::D baseline: not known" in list(annotation_lines(report))
    assert "student.int8.onnx NOT GATED: D baseline: not known" in reason_lines(report)


def test_what_artifacts_share_with_their_student_is_annotated_once(report: Report) -> None:
    reason = "B distillation: fell short"
    for entry in (report["student"], *report["artifacts"].values()):
        entry |= {"verdict": "FAIL", "reasons": [reason]}
    assert [line for line in annotation_lines(report) if reason in line] == [
        f"::error title=fp32 student%3A FAIL::{reason}"
    ]


def test_annotations_escape_what_would_end_them() -> None:
    assert annotation("error", "a: b, 5%\n", "100%\r\nof") == "::error title=a%3A b%2C 5%25%0A::100%25%0D%0Aof"
