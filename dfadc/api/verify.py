"""Stage four: every artifact on the frozen samples.

Imports no torch; only the accuracy of teacher and student on labelled data does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.errors import DfadcError, RequirementMissing
from dfadc.recipe import Recipe, load_recipe
from dfadc.storage import atomic_write_text, write_json
from dfadc.verification.agreement import Accuracy, accuracy
from dfadc.verification.answers import ask, level
from dfadc.verification.gate import Thresholds
from dfadc.verification.report import LabelledAccuracy, Report, build_report, render_markdown
from dfadc.verification.results import (
    ArtifactFile,
    ArtifactResult,
    artifact_not_run,
    verify_artifact,
    verify_student,
)
from dfadc.verification.samples import SampleSet
from exporters.describe import artifact_metadata
from exporters.engine_sessions import open_session
from exporters.manifest import FILE_NAME, ArtifactRecord, Manifest, check_unchanged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from dfadc.contract import ImageContract
    from dfadc.run import RunFolder
    from dfadc.verification.data import EvaluationData

#: Images that a session is given at once.
BATCH_SIZE = 64


@dataclass(frozen=True)
class VerifySettings:
    """What a caller may ask of a verification beyond the recipe.

    Args:
        data: ImageFolder or .npz with labels, for accuracy. It evaluates; it selects nothing.
        min_agreement: in place of ``verify.min_agreement``.
        required: artifact files that must have run, besides those of the recipe.
        trust_teacher: whether code in the teacher file may run, for its accuracy.
    """

    data: Path | None = None
    min_agreement: float | None = None
    required: Sequence[str] = ()
    trust_teacher: bool = False


def check_data(path: Path, contract: ImageContract) -> None:
    """Reads labelled images as a verification will, so that a long run does not end with data that do not fit.

    Raises:
        DfadcError: the data cannot be read or do not fit the contract.
    """
    _load_data(path, contract)


def verify_run(run: RunFolder, settings: VerifySettings | None = None) -> Report:
    """Judges the fp32 student and every artifact of a run; writes report.json and report.md.

    Returns:
        The report as JSON values; its ``exit_code`` is what the command exits with.

    Raises:
        DfadcError: an artifact's bytes are not those that were exported, or the data cannot be used.
    """
    settings = settings or VerifySettings()
    run.require_finished()
    recipe, record = load_recipe(run.recipe), run.record()
    manifest = check_unchanged(run.path) if (run.path / FILE_NAME).exists() else Manifest()
    samples = SampleSet.load(run.samples)
    thresholds = gate_thresholds(recipe, settings.min_agreement)
    labelled = None if settings.data is None else _load_data(settings.data, samples.contract)
    judge = _Judge(samples, thresholds, labelled)
    report = build_report(
        samples=samples,
        thresholds=thresholds,
        student=verify_student(samples, thresholds),
        artifacts=[judge.artifact(_artifact_file(known), run.path / known.file) for known in manifest.artifacts],
        accuracy=None if labelled is None else _reference_accuracy(run, labelled, trust=settings.trust_teacher),
        required={*recipe.verify.required, *settings.required},
        run=_describe(run, record),
    )
    write_json(run.report_json, report)
    atomic_write_text(run.report_md, render_markdown(report))
    return report


def verify_file(artifact: Path, samples_path: Path, settings: VerifySettings | None = None) -> Report:
    """Judges one artifact on a samples file, with no run and no teacher at hand.

    Raises:
        DfadcError: a file is missing or damaged, or the artifact does not take these samples.
    """
    settings = settings or VerifySettings()
    if not artifact.is_file():
        raise DfadcError(f"there is no artifact {artifact}", "check the path")
    samples = SampleSet.load(samples_path)
    thresholds = gate_thresholds(load_recipe("auto"), settings.min_agreement)
    labelled = None if settings.data is None else _load_data(settings.data, samples.contract)
    precision = artifact_metadata(artifact).get("dfadc.precision", "fp32")
    file = ArtifactFile(artifact.name, precision, artifact.stat().st_size)
    result = _Judge(samples, thresholds, labelled).artifact(file, artifact)
    return build_report(
        samples=samples,
        thresholds=thresholds,
        student=verify_student(samples, thresholds),
        artifacts=[result],
        required=settings.required,
    )


class _Judge:
    """Runs artifacts on the same samples and the same labelled data."""

    def __init__(self, samples: SampleSet, thresholds: Thresholds, data: EvaluationData | None) -> None:
        self.samples = samples
        self.thresholds = thresholds
        self.data = data

    def artifact(self, file: ArtifactFile, path: Path) -> ArtifactResult:
        try:
            session = open_session(path, batch_size=BATCH_SIZE)
        except RequirementMissing as exc:
            return artifact_not_run(file, exc.message)
        form = artifact_metadata(path)
        contract = self.samples.contract
        with session:
            logits = ask(session.run, self.samples.normalised(), form=form, contract=contract)
            if logits.shape != self.samples.teacher_logits.shape:
                raise DfadcError(
                    f"{path} answers {logits.shape[1:]}, the samples have {contract.num_classes} classes",
                    "verify it with the samples of its own run",
                )
            logits = level(logits, self.samples.student_logits, form=form)
            measured = None
            if self.data is not None:
                batches = self.data.batches(BATCH_SIZE)
                answers = [ask(session.run, batch, form=form, contract=contract) for batch in batches]
                measured = accuracy(np.concatenate(answers), self.data.labels)
        return verify_artifact(file, logits, samples=self.samples, thresholds=self.thresholds, accuracy=measured)


def gate_thresholds(recipe: Recipe, min_agreement: float | None = None) -> Thresholds:
    """The gates of a recipe; ``min_agreement`` takes the place of its ``verify.min_agreement``."""
    verify = recipe.verify
    wanted = verify.min_agreement if min_agreement is None else min_agreement
    return Thresholds(
        min_agreement=None if wanted == "off" else wanted,
        min_coverage=verify.min_coverage,
        source=verify.gate_source,
    )


def _artifact_file(record: ArtifactRecord) -> ArtifactFile:
    return ArtifactFile(Path(record.file).name, record.requested_precision, record.size_bytes)


def _load_data(path: Path, contract: ImageContract) -> EvaluationData:
    from dfadc.verification.data import load_evaluation_data  # noqa: PLC0415 - pillow, only with --data

    return load_evaluation_data(path, contract)


def _reference_accuracy(run: RunFolder, data: EvaluationData, *, trust: bool) -> LabelledAccuracy:
    """Teacher and fp32 student on labelled images; the one part of verification that needs torch and the teacher."""
    from dfadc.api.distil import load_run_teacher  # noqa: PLC0415
    from dfadc.models.network_file import load_network  # noqa: PLC0415

    teacher = load_run_teacher(run, trust=trust)
    student, _ = load_network(run.student, architecture=run.record()["student"]["architecture"])
    return LabelledAccuracy(teacher=_measure(teacher.module, data), student=_measure(student, data))


def _measure(network: nn.Module, data: EvaluationData) -> Accuracy:
    from exporters.sessions import TorchSession  # noqa: PLC0415

    with TorchSession(network.eval(), "cpu", batch_size=BATCH_SIZE) as session:
        return accuracy(np.concatenate([session.run(batch) for batch in data.batches(BATCH_SIZE)]), data.labels)


def _describe(run: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    kept = ("teacher", "student", "contract", "seed", "device", "precision", "versions", "git_commit", "seconds")
    described = {name: record.get(name) for name in kept}
    described["teacher"] = {name: value for name, value in record["teacher"].items() if name != "path"}
    return {"name": run.path.name, **described}
