"""Outputs for CI systems besides stdout and exit code: a JUnit file, GitHub's summary and annotations."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from dfadc.errors import DfadcError, StorageFailed

Publish = Callable[[Mapping[str, Any]], None]


@contextmanager
def ci_outputs(junit: Path | None) -> Iterator[Publish]:
    """Yields a function that publishes a finished report.

    ``junit`` is written at once, as of an unfinished verification: this shows that the path is writable before any
    work is done, and neither an error nor a crash leaves the file of an earlier job behind.

    Raises:
        StorageFailed: ``junit`` cannot be written.
    """
    from dfadc.reporting.junit import render_junit, render_junit_error  # noqa: PLC0415 -- keeps `--help` light

    def publish(report: Mapping[str, Any]) -> None:
        from dfadc.reporting.markdown import render_markdown  # noqa: PLC0415

        if junit is not None:
            _write_junit(junit, render_junit(report))
        _append_summary(render_markdown(report))
        _annotate(report)

    if junit is not None:
        _write_junit(junit, render_junit_error("the verification did not come to its end"))
    try:
        yield publish
    except DfadcError as exc:
        _append_summary(f"# Verification: no verdict, exit code {exc.exit_code}\n\n{exc.message}\n")
        if junit is not None:
            _write_junit(junit, render_junit_error(exc.message))
        raise


def annotate_error(error: DfadcError) -> None:
    """Writes an error as an annotation on GitHub Actions."""
    if _on_github():
        from dfadc.reporting.github import annotation  # noqa: PLC0415

        typer.echo(annotation("error", "dfadc", error.message), file=sys.stderr)


def _on_github() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"


def _annotate(report: Mapping[str, Any]) -> None:
    """Writes annotations to stderr: GitHub's runner reads both streams, and stdout may have to be pure JSON."""
    if _on_github():
        from dfadc.reporting.github import annotation_lines  # noqa: PLC0415

        for line in annotation_lines(report):
            typer.echo(line, file=sys.stderr)


def _append_summary(text: str) -> None:
    """Appends Markdown to the job's page. A page that cannot be written does not change the verdict."""
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return
    try:
        with Path(name).open("a", encoding="utf-8") as stream:
            stream.write(f"{text}\n")
    except OSError as exc:
        typer.echo(f"warning: cannot write $GITHUB_STEP_SUMMARY {name}: {exc.strerror or exc}", file=sys.stderr)


def _write_junit(path: Path, text: str) -> None:
    from dfadc.storage import atomic_write_text  # noqa: PLC0415

    try:
        atomic_write_text(path, text)
    except StorageFailed as exc:
        raise StorageFailed(exc.message, "choose a writable --junit") from exc
