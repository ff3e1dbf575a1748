"""A report as JUnit XML."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from dfadc.verification.checks import COMPARISON_NAMES, Verdict
from dfadc.verification.summary import judged_networks

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Characters that XML 1.0 cannot hold.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_COUNTED = ("failure", "error", "skipped")


def render_junit(report: Mapping[str, Any]) -> str:
    """The report as JUnit XML: one suite for each network, one test case for each gate, and one for the verdict.

    NOT RUN and NOT GATED are skipped; a required artifact that is NOT RUN is a failure of its own. The verdict's case
    fails for every exit code but 0, and is skipped if nothing was judged by all its gates.
    """
    root = ET.Element("testsuites", name="dfadc verify")
    for name, entry in judged_networks(report).items():
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
    _verdict_case(ET.SubElement(root, "testsuite", name="verdict"), report)
    return _finish(root)


def render_junit_error(message: str) -> str:
    """JUnit XML of an unfinished verification: one test case, in error."""
    root = ET.Element("testsuites", name="dfadc verify")
    case = ET.SubElement(ET.SubElement(root, "testsuite", name="dfadc verify"), "testcase", name="verification")
    case.set("classname", "dfadc verify")
    ET.SubElement(case, "error", message=_printable(message))
    return _finish(root)


def _case(suite: ET.Element, name: str, verdict: str, message: str) -> None:
    case = ET.SubElement(suite, "testcase", classname=suite.attrib["name"], name=name)
    if verdict == Verdict.FAIL:
        ET.SubElement(case, "failure", message=_printable(message))
    elif verdict != Verdict.PASS:
        ET.SubElement(case, "skipped", message=_printable(f"{verdict}: {message}"))


def _verdict_case(suite: ET.Element, report: Mapping[str, Any]) -> None:
    """The test case of the verdict and exit code."""
    text = "; ".join([report["headline"], *report["reasons"]])
    no_artifact_ran = all(entry["verdict"] == Verdict.NOT_RUN for entry in report["artifacts"].values())
    case = ET.SubElement(suite, "testcase", classname="verdict", name="verdict")
    if report["exit_code"]:
        ET.SubElement(case, "failure", message=_printable(f"{text} (exit code {report['exit_code']})"))
    elif report["verdict"] != Verdict.PASS or no_artifact_ran:
        ET.SubElement(case, "skipped", message=_printable(text))
    ET.SubElement(case, "system-out").text = _printable(text)


def _finish(root: ET.Element) -> str:
    """The document as text, with the counts that JUnit requires of each suite and of the whole."""
    for element in (*root, root):
        element.set("tests", str(sum(1 for _ in element.iter("testcase"))))
        for kind in _COUNTED:
            count = sum(1 for _ in element.iter(kind))
            element.set({"failure": "failures", "error": "errors"}.get(kind, kind), str(count))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    return _NOT_XML.sub("?", text)
