"""A report as annotations of GitHub Actions. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfadc.verification.checks import Verdict
from dfadc.verification.summary import network_reasons

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def annotation_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Workflow commands: an error for each failed gate and missing requirement, a warning for each other reason."""
    if report["exit_code"] or report["headline"] != Verdict.PASS:
        level = "error" if report["exit_code"] else "warning"
        yield annotation(level, f"verification: {report['headline']}", "; ".join(report["reasons"]))
    for name, verdict, reason in network_reasons(report):
        yield annotation("error" if verdict == Verdict.FAIL else "warning", f"{name}: {verdict}", reason)


def annotation(level: str, title: str, message: str) -> str:
    """A workflow command of GitHub Actions; ``level`` is "error" or "warning"."""
    data, name = (text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A") for text in (message, title))
    return f"::{level} title={name.replace(':', '%3A').replace(',', '%2C')}::{data}"
