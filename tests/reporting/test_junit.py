"""JUnit XML: red for exactly the exit codes other than 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from report_material import judged_report, passing

from dfadc.reporting.junit import render_junit, render_junit_error
from dfadc.verification.gate import EXIT_GATE_FAILED, EXIT_REQUIREMENT_MISSING

if TYPE_CHECKING:
    from dfadc.verification.report import Report


@pytest.fixture
def report() -> Report:
    return judged_report()


def suites(report: Report) -> dict[str, ET.Element]:
    root = ET.fromstring(render_junit(report))  # noqa: S314 -- written a line above
    assert root.tag == "testsuites"
    for counted in (root, *root):
        for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
            assert counted.get(attribute) == str(len(list(counted.iter(tag))))
        assert counted.get("errors") == "0"
    return {str(suite.get("name")): suite for suite in root}


def outcomes(suite: ET.Element) -> dict[str, str]:
    return {str(case.get("name")): case[0].tag if len(case) else "passed" for case in suite}


def test_every_gate_is_a_test_case(report: Report) -> None:
    found = suites(report)
    entries: dict[str, Any] = {"fp32 student": report["student"], **report["artifacts"]}
    assert list(found) == [*entries, "verdict"]
    for name, entry in entries.items():
        assert len(found[name]) == max(1, len(entry["checks"]))
        assert {case.get("classname") for case in found[name]} == {name}
    assert outcomes(found["student.int8.onnx"])["A export: agreement"] == "failure"
    failure = next(found["student.int8.onnx"].iter("failure"))
    assert "the artifact agrees with the fp32 student on" in str(failure.get("message"))


def test_not_run_is_skipped_with_its_reason(report: Report) -> None:
    (case,) = suites(report)["student.rtx.engine"]
    (skipped,) = case
    assert (case.get("name"), skipped.tag) == ("runs", "skipped")
    assert skipped.get("message") == "NOT RUN: no NVIDIA GPU & none at all"


def test_a_gate_that_is_off_is_skipped(report: Report) -> None:
    report["student"]["checks"][0] |= {"verdict": "NOT GATED", "message": "off"}
    assert "skipped" in outcomes(suites(report)["fp32 student"]).values()


@pytest.mark.parametrize("absent", ["student.rtx.engine", "never.exported.onnx"])
def test_something_required_that_did_not_run_is_a_failure(absent: str, report: Report) -> None:
    report = passing(report)
    report["gate"]["required"] = [absent, "student", "student.onnx"]
    assert outcomes(suites(report)["required"]) == {absent: "failure", "student": "passed", "student.onnx": "passed"}


@pytest.mark.parametrize("required", [[], ["student.onnx"], ["student.rtx.engine"]])
@pytest.mark.parametrize("fails", [False, True])
def test_it_is_red_exactly_where_the_exit_code_is_not_0(fails: bool, required: list[str], report: Report) -> None:
    report = report if fails else passing(report)
    missing = required == ["student.rtx.engine"]
    exit_code = EXIT_GATE_FAILED if fails else EXIT_REQUIREMENT_MISSING if missing else 0
    report["gate"]["required"] = required
    report["exit_code"] = exit_code
    failures = sum(int(str(suite.get("failures"))) for suite in suites(report).values())
    assert (failures > 0) == (exit_code > 0)


@pytest.mark.parametrize(
    ("changes", "outcome", "says"),
    [
        ({"verdict": "PASS", "headline": "PASS"}, "passed", "PASS"),
        ({"verdict": "PASS", "headline": "PASS: 1 of 2 artifacts ran"}, "passed", "PASS: 1 of 2 artifacts ran"),
        ({"verdict": "PASS", "headline": "PASS: 0 of 1 artifacts ran"}, "skipped", "PASS: 0 of 1 artifacts ran"),
        ({"verdict": "NOT GATED", "headline": "NOT GATED", "reasons": ["off"]}, "skipped", "NOT GATED; off"),
        ({"verdict": "FAIL", "headline": "FAIL", "exit_code": 5, "reasons": ["not exported: x"]}, "failure", "x"),
        ({"verdict": "NOT RUN", "headline": "NOT RUN", "exit_code": 4, "reasons": ["gone"]}, "failure", "gone"),
    ],
)
def test_the_verdict_is_a_test_case_that_fails_with_the_process(
    changes: dict[str, Any], outcome: str, says: str, report: Report
) -> None:
    """Where every gate held, too: an export may have failed."""
    report = passing(report) | changes
    if "0 of 1" in report["headline"]:
        del report["artifacts"]["student.onnx"]
    suite = suites(report)["verdict"]
    assert {**outcomes(suite), "verdict": "passed" if suite[0][0].tag == "system-out" else suite[0][0].tag} == {
        "verdict": outcome
    }
    assert says in str(suite[0].findtext("system-out"))
    assert sum(len(list(found.iter("failure"))) for found in suites(report).values()) == (outcome == "failure")


def test_an_error_is_one_test_case_in_error() -> None:
    root = ET.fromstring(render_junit_error('cannot read "a" & <b>\x00\x1b: \ud800'))  # noqa: S314
    (error,) = root.iter("error")
    assert error.get("message") == 'cannot read "a" & <b>??: ?'
    assert (root.get("tests"), root.get("errors"), root.get("failures")) == ("1", "1", "0")
