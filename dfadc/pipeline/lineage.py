"""Lineage: hashes that tie a run's student, samples and artifacts together. Imports no torch."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from dfadc.errors import DfadcError
from dfadc.storage import sha256_file
from dfadc.verification.archive import read_archive
from dfadc.verification.samples import SCHEMA, STUDENT_SHA256, TEACHER_SHA256
from exporters.describe import artifact_metadata

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from dfadc.run_folder import RunFolder
    from dfadc.verification.pixel_samples import Samples
    from exporters.manifest import ArtifactRecord, Manifest


def check_student(run: RunFolder) -> list[str]:
    """Compares the student's file with the one whose logits the samples hold.

    Gives a note if the samples are of an earlier version, which did not record the student.

    Raises:
        DfadcError: it is another file, or the samples cannot be read.
    """
    if not run.samples.exists():
        return []
    metadata, _ = read_archive(run.samples, (), schema=SCHEMA, kind="sample file")
    recorded = dict(metadata.get("provenance") or {}).get(STUDENT_SHA256)
    if recorded is None:
        return [f"{run.samples.name} does not record whose answers it holds: {run.student.name} may be another student"]
    actual = sha256_file(run.student)
    if actual != recorded:
        raise DfadcError(
            f"{run.student} is not the student whose answers {run.samples} holds: sha256 {actual[:12]}…, recorded "
            f"{str(recorded)[:12]}…",
            "put the student and the samples of one run together again, or distil anew",
        )
    return []


def check_lineage(run: RunFolder, manifest: Manifest, *, changed: Collection[str] = ()) -> list[str]:
    """Checks that the samples and the artifacts belong to the student of a finished run.

    Artifacts whose file is among ``changed`` are not read. Gives notes on files without a recorded hash.

    Raises:
        DfadcError: a file belongs to another student.
    """
    notes = check_student(run)
    actual, unknown = sha256_file(run.student), []
    records = {record.sha256: record for record in manifest.artifacts if record.file not in changed}
    for record in records.values():
        made_of = _student_behind(record, records, run.path)
        if made_of is None:
            unknown.append(record.file)
        elif made_of != actual:
            raise DfadcError(
                f"{run.path / record.file} was made of another student: sha256 {made_of[:12]}…, {run.student} has "
                f"{actual[:12]}…",
                f"export {record.exporter}:{record.requested_precision} again",
            )
    if unknown:
        notes.append(f"{', '.join(unknown)}: the student is not recorded")
    return notes


class SamplesOrigin(NamedTuple):
    """Comparison of the samples' student with the artifact's: true if they differ, with notes."""

    is_other: bool
    notes: list[str]


def check_samples(
    samples: Samples, path: Path, artifact: Path, form: Mapping[str, str], *, compares_export: bool
) -> SamplesOrigin:
    """Checks that the samples of ``path`` and an artifact belong to the same teacher and student.

    ``form`` is the artifact's metadata; ``compares_export``: comparison A, with the samples' student, has gates.

    Raises:
        DfadcError: the samples are of another teacher, or of another student and comparison A has gates.
    """
    own_teacher, samples_teacher = form.get("dfadc.teacher_sha256"), samples.recorded(TEACHER_SHA256)
    if own_teacher is not None and samples_teacher is not None and own_teacher != samples_teacher:
        raise DfadcError(
            f"{path} are samples of another teacher: sha256 {samples_teacher[:12]}…, {artifact.name} was distilled "
            f"from {own_teacher[:12]}…",
            "pass samples of the artifact's teacher",
        )
    made_of, student = student_of(artifact, form), samples.recorded(STUDENT_SHA256)
    if made_of is None or student is None:
        file = artifact if made_of is None else path
        note = f"{file.name} does not record its student: comparison A may be with another student than the artifact's"
        return SamplesOrigin(is_other=False, notes=[note])
    if made_of == student:
        return SamplesOrigin(is_other=False, notes=[])
    message = (
        f"{path} are samples of another student: sha256 {student[:12]}…, {artifact.name} was made of {made_of[:12]}…"
    )
    if compares_export:
        flag = "--set verify.compare_export=false"
        raise DfadcError(
            message, f"pass samples.npz of its own run; or judge its agreement with the teacher alone: {flag}"
        )
    return SamplesOrigin(is_other=True, notes=[f"{message}; it is compared with the teacher alone"])


def student_of(artifact: Path, form: Mapping[str, str]) -> str | None:
    """SHA-256 of the student in an artifact's metadata; None if it is not recorded."""
    made_of = form.get("dfadc.student_sha256")
    if made_of is None and artifact.suffix == ".onnx" and form.get("dfadc.precision") == "fp32":
        return form.get("dfadc.parent_sha256")  # earlier versions recorded nothing else
    return made_of


def _student_behind(record: ArtifactRecord, records: Mapping[str, ArtifactRecord], folder: Path) -> str | None:
    """SHA-256 of an artifact's student, from its own metadata or else from the nearest source that records it."""
    seen: set[str] = set()
    current: ArtifactRecord | None = record
    while current is not None and current.sha256 not in seen:
        seen.add(current.sha256)
        path = folder / current.file
        with suppress(DfadcError):  # it cannot be read here, but its source may record it
            if (made_of := student_of(path, artifact_metadata(path))) is not None:
                return made_of
        current = records.get(current.parent_sha256 or "")
    return None
