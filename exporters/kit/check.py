"""Program of a device kit: checks its models on the frozen samples with numpy and one runtime. Imports no torch."""

from __future__ import annotations

import argparse
import io
import json
import sys
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError, RequirementMissing, RuntimeCrashed, RuntimeRefused
from dfadc.storage import read_json, sha256_file
from dfadc.verification.artifact_logits import artifact_logits, restore_offset
from dfadc.verification.checks import remark_checks
from dfadc.verification.judge import (
    ArtifactFile,
    ArtifactResult,
    artifact_failed,
    artifact_not_run,
    verify_artifact,
    verify_student,
)
from dfadc.verification.pixel_outputs import batch_size
from dfadc.verification.pixel_samples import Samples, load_samples
from dfadc.verification.report import Report, build_report
from dfadc.verification.summary import COLUMNS, reason_lines, summary_rows
from dfadc.verification.thresholds import ExportLimits, Thresholds
from exporters.kit.device_sessions import fitting_runtimes, open_on_device
from exporters.sessions.isolated import IsolatedSession

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FACTS = "kit.json"
SCHEMA = "dfadc.kit/1"


def main(folder: Path, arguments: Sequence[str] | None = None) -> int:
    """Checks the models of the kit in ``folder`` and returns the exit code of `dfadc verify`."""
    parser = argparse.ArgumentParser(prog="check.py", description="Check the models of this kit on this device.")
    parser.add_argument("files", nargs="*", help="models or engines of this folder; by default all that exist")
    parser.add_argument(
        "--runtime", default="", help="onnxruntime, openvino or tensorrt; by default the one that is installed"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 lets the runtime choose")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a device's console may be plain ASCII
        sys.stdout.reconfigure(errors="replace")
    try:
        report = check_kit(folder, given.files, runtime=given.runtime, threads=given.threads)
    except DfadcError as exc:
        sys.stderr.write(f"error: {exc.message}\n" + (f"hint: {exc.hint}\n" if exc.hint else ""))
        return exc.exit_code
    sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n" if given.json else _text(report))
    return int(report["exit_code"])


def check_kit(folder: Path, names: Sequence[str] = (), *, runtime: str = "", threads: int = 0) -> Report:
    """Runs and judges the models of a kit; empty ``names`` take all that exist, of which one must run.

    An empty runtime takes the first that is installed; with 0 threads it chooses.

    Raises:
        DfadcError: a file of the kit is missing or damaged, or a name is unknown.
    """
    facts = read_json(folder / FACTS, schema=SCHEMA, hint="write the kit again: dfadc export RUN -e kit")
    samples = load_samples(folder / "samples.npz")
    limits = {precision: ExportLimits(**values) for precision, values in facts["thresholds"]["export"].items()}
    thresholds = Thresholds(**{**facts["thresholds"], "export": limits})
    known = facts["models"]
    if unknown := sorted(set(names) - set(known)):
        raise DfadcError(f"{unknown[0]} is not a model of this kit", f"models: {', '.join(known)}")
    chosen = [name for name in known if (name in names if names else (folder / name).exists())]
    results = []
    for name in chosen:
        artifact = ArtifactFile(name, known[name]["precision"], _size(folder / name))
        if not names and not fitting_runtimes(folder / name, runtime):  # not requested by name
            results.append(artifact_not_run(artifact, f"{runtime} does not run {name}"))
            continue
        try:
            results.append(_check(folder / name, artifact, known[name], samples, thresholds, (runtime, threads)))
        except (RequirementMissing, RuntimeRefused) as exc:
            results.append(artifact_not_run(artifact, exc.message))
        except RuntimeCrashed as exc:
            results.append(artifact_failed(artifact, exc.message))
    ran = any(result.judgement.checks for result in results)
    return build_report(
        samples=samples,
        thresholds=thresholds,
        student=verify_student(samples, thresholds),
        artifacts=results,
        required=names or ([] if ran else chosen or list(known)),
    )


def _check(
    path: Path,
    artifact: ArtifactFile,
    facts: Mapping[str, Any],
    samples: Samples,
    thresholds: Thresholds,
    how: tuple[str, int],
) -> ArtifactResult:
    """Runs and judges one model; a changed file is judged too, with a warning."""
    if not path.exists():
        raise RequirementMissing(f"{path.name} is not here; an engine is built by ./build.sh")
    if facts["sha256"] is not None and sha256_file(path) != facts["sha256"]:
        sys.stderr.write(f"warning: {path.name} is not the file that was exported\n")
    form, (runtime, threads) = facts["form"], how
    with IsolatedSession(open_on_device, path, runtime=runtime, threads=threads) as session:
        batches = samples.batches(batch_size(samples.contract, session.batch_size))
        answers = (artifact_logits(session.run, images, form=form, contract=samples.contract) for images in batches)
        given = samples.collect(answers, path.name)
        extras = remark_checks(session.remark)
    given = restore_offset(given, samples.student_outputs, form=form)
    return verify_artifact(artifact, given, samples=samples, thresholds=thresholds, extras=extras)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _text(report: Report) -> str:
    """The summary as aligned columns, the reasons and the verdict."""
    rows = [COLUMNS, *summary_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *reason_lines(report), f"verdict: {report['headline']}", ""])
