"""A report as CI systems read it: JUnit XML, and GitHub's annotations. Standard library only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from dfadc.verification.gate import COMPARISON_NAMES, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Characters that XML 1.0 cannot hold.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_COUNTED = ("failure", "error", "skipped")


def render_junit(report: Mapping[str, Any]) -> str:
    """The report as JUnit XML: a suite a network, a test case a gate. A test fails where the exit code is not 0.

    NOT RUN and NOT GATED are skipped; that something required was NOT RUN is a failure of its own.
    """
    root = ET.Element("testsuites", name="dfadc verify")
    for name, entry in {"fp32 student": report["student"], **report["artifacts"]}.items():
        suite = ET.SubElement(root, "testsuite", name=name)
        if not entry["checks"]:
            _case(suite, "runs", entry["verdict"], "; ".join(entry["reasons"]))
        for check in entry["checks"]:
            title = f"{COMPARISON_NAMES[check['comparison']]}: {check['gate']}"
            _case(suite, title, check["verdict"], check["message"])
    if required := report["gate"]["required"]:
        suite = ET.SubElement(root, "testsuite", name="required")
        entries = {"student": report["student"], **report["artifacts"]}
        for name in required:
            ran = name in entries and entries[name]["verdict"] != Verdict.NOT_RUN
            _case(suite, name, Verdict.PASS if ran else Verdict.FAIL, f"{name} is required and did not run")
    return _finish(root)


def render_junit_error(message: str) -> str:
    """JUnit XML of a verification that did not come to its end: one test case, in error."""
    root = ET.Element("testsuites", name="dfadc verify")
    case = ET.SubElement(ET.SubElement(root, "testsuite", name="dfadc verify"), "testcase", name="verification")
    case.set("classname", "dfadc verify")
    ET.SubElement(case, "error", message=_printable(message))
    return _finish(root)


def annotation_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """GitHub's workflow commands: an error for each failed gate and for what is missing, a warning for the rest."""
    if report["exit_code"]:
        yield annotation("error", f"verification: {report['verdict']}", "; ".join(report["reasons"]))
    student = report["student"]
    for name, entry in {"fp32 student": student, **report["artifacts"]}.items():
        for reason in entry["reasons"]:
            # Every artifact fails with its student: that is said once, at the student.
            if entry is student or reason not in student["reasons"]:
                level = "error" if entry["verdict"] == Verdict.FAIL else "warning"
                yield annotation(level, f"{name}: {entry['verdict']}", reason)


def annotation(level: str, title: str, message: str) -> str:
    """One of GitHub's workflow commands; ``level`` is "error" or "warning"."""
    data = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    name = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{data}"


def _case(suite: ET.Element, name: str, verdict: str, message: str) -> None:
    case = ET.SubElement(suite, "testcase", classname=suite.attrib["name"], name=name)
    if verdict == Verdict.FAIL:
        ET.SubElement(case, "failure", message=_printable(message))
    elif verdict != Verdict.PASS:
        ET.SubElement(case, "skipped", message=_printable(f"{verdict}: {message}"))


def _finish(root: ET.Element) -> str:
    """The document, with the counts that its suites and the whole must have."""
    for element in (*root, root):
        element.set("tests", str(sum(1 for _ in element.iter("testcase"))))
        for kind in _COUNTED:
            count = sum(1 for _ in element.iter(kind))
            element.set({"failure": "failures", "error": "errors"}.get(kind, kind), str(count))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    return _NOT_XML.sub("?", text)
