"""The stage `report`: a run's verification as JSON, Markdown and HTML. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError, StorageFailed
from dfadc.recipe.load import load_recipe
from dfadc.reporting.disagreements import describe_disagreements
from dfadc.reporting.markdown import render_details, render_markdown
from dfadc.run_lock import holding_writable_run, is_writable
from dfadc.storage import atomic_write_text, read_json, without_nan, write_json
from dfadc.verification.pixel_samples import Samples, load_samples
from dfadc.verification.report import SCHEMA, Report
from dfadc.verification.samples import SampleSet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dfadc.run_folder import RunFolder
    from exporters.manifest import Manifest

#: Entries of run.json that a report repeats.
_RECORDED = (
    *("command", "started", "seconds", "teacher", "student", "contract", "seed", "device", "precision", "threads"),
    *("versions", "python", "platform", "git_commit", "notes"),
)
#: Notes of the training that a report repeats, the first ones.
MAX_NOTES = 20
#: Beginning of a report's note on a folder that could not take it.
NOT_WRITTEN = "report not written"


def write_report(run: RunFolder, report: Report, samples: Samples | None) -> Report:
    """Completes a verification's report from the run folder and writes it in every form.

    Gives the report with ``disagreements``, ``curves`` and ``bench``, and a note if a file could not be written: the
    verdict does not depend on it. Without samples, which may be gone, there are no pictures of them.

    Raises:
        DfadcError: ``bench.json`` cannot be read.
    """
    readings = [line for line in run.read_metrics() if isinstance(line, dict)]
    if isinstance(samples, SampleSet):
        report["disagreements"] = describe_disagreements(samples, report["gate"]["source"])
    report["curves"] = _describe_training(readings)
    report["bench"] = _speeds(run, report)
    try:
        _write_files(run, report, samples, readings)
    except StorageFailed as exc:
        note = f"{NOT_WRITTEN}: {exc.message} ({exc.hint})"
        return {**report, "notes": [*report.get("notes", ()), note]}
    return report


@holding_writable_run
def rebuild_report(run: RunFolder) -> Report:
    """Writes the last verification of a run in every form, from its folder.

    Raises:
        DfadcError: there is no report that this dfadc reads, or it judged other samples than those in the folder.
    """
    report = read_json(run.report_json, schema=SCHEMA, hint=f"make it: dfadc verify {run.path}")
    samples = load_samples(run.samples) if run.samples.exists() else None
    if samples is not None and samples.sha256 != report["samples"]["sha256"]:
        raise DfadcError(
            f"{run.samples} is not the sample set that {run.report_json.name} judged",
            f"judge this one: dfadc verify {run.path}",
        )
    return write_report(run, report, samples)


def describe_run(run: RunFolder, manifest: Manifest) -> dict[str, Any]:
    """A run's record, recipe and artifacts as plain JSON values."""
    record = run.record()
    described = {name: record.get(name) for name in _RECORDED}
    described["teacher"] = {name: value for name, value in record["teacher"].items() if name != "path"}
    return {
        "name": run.path.resolve().name,
        **described,
        "recipe": load_recipe(run.recipe).model_dump(mode="json"),
        "artifacts": [dataclasses.asdict(artifact) for artifact in manifest.artifacts],
    }


def _describe_training(readings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last reading of the training, and its notes. NaN and infinity become null: JSON has neither."""
    last = readings[-1] if readings else {}
    numbers = {name: value for name, value in last.items() if isinstance(value, int | float)}
    notes = [f"step {reading.get('step')}: {reading['note']}" for reading in readings if reading.get("note")]
    return {
        "readings": len(readings),
        "last": without_nan(numbers),
        "notes": notes[:MAX_NOTES],
        "num_notes": len(notes),
    }


def _speeds(run: RunFolder, report: Report) -> dict[str, Any] | None:
    """The measured speeds, without those of artifacts that were exported anew since; None if none were measured."""
    if not run.bench.exists():
        return None
    hint = f"measure anew: dfadc bench {run.path}"
    bench = read_json(run.bench, hint=hint)
    verified = {file["sha256"] for file in report["run"].get("artifacts") or []}
    try:
        networks = {
            name: speed
            for name, speed in bench["networks"].items()
            if name not in report["artifacts"] or speed["sha256"] in verified
        }
    except (AttributeError, KeyError, TypeError) as exc:
        raise DfadcError(f"{run.bench} holds no speeds: {exc!r}", hint) from exc
    return {**bench, "networks": networks}


def _write_files(
    run: RunFolder, report: Report, samples: Samples | None, readings: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the report in every form."""
    # The drawing libraries take a second to import: commands that draw nothing do without.
    from dfadc.reporting.charts import panels_of  # noqa: PLC0415
    from dfadc.reporting.html import render_html  # noqa: PLC0415

    if not is_writable(run.path):
        raise StorageFailed(f"{run.path} is not writable here", "make it writable, or copy the run")
    write_json(run.report_json, report)
    atomic_write_text(run.report_md, f"{render_markdown(report)}\n{render_details(report)}")
    atomic_write_text(run.report_html, render_html(report, samples=samples, panels=panels_of(readings)))
