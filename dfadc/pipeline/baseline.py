"""The stage `baseline`: freezes a run's predictions for later comparisons.

Imports torch only for the fp32 student on labelled images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dfadc.errors import DfadcError, RequirementMissing, RuntimeCrashed, RuntimeRefused
from dfadc.pipeline.gates import gate_thresholds
from dfadc.pipeline.inference import (
    NetworkOutputs,
    VerificationInputs,
    classes_of,
    read_inputs,
    run_artifact,
    run_student,
    with_recomputed_student,
)
from dfadc.pipeline.lineage import check_lineage
from dfadc.pipeline.network_judge import NetworkJudge
from dfadc.recipe.load import load_recipe
from dfadc.verification.agreement import of_samples
from dfadc.verification.baseline import Baseline, LabelledResults
from dfadc.verification.checks import Verdict
from dfadc.verification.gate import STUDENT
from dfadc.verification.judge import ArtifactFile
from dfadc.verification.pixel_samples import load_samples
from dfadc.verification.regression import (
    GATED_SOURCE,
    baseline_checks,
    compare_with_baseline,
    describe_origin,
    unseen_drops,
)
from dfadc.verification.samples import STUDENT_SHA256, SampleSet
from exporters.manifest import FILE_NAME, NOT_LISTED, Manifest, check_unchanged

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from dfadc.run_folder import RunFolder
    from dfadc.verification.thresholds import Thresholds


class FrozenBaseline(NamedTuple):
    """A written baseline, the artifacts left out of it with the reason, and notes on its limits."""

    baseline: Baseline
    left_out: dict[str, str]
    notes: list[str]


def write_baseline(
    run: RunFolder, path: Path, *, data: Path | None = None, force: bool = False, factories: Collection[str] = ()
) -> FrozenBaseline:
    """Runs the artifacts of a run and freezes their predictions, with the fp32 student's and the run's samples.

    Args:
        run: a finished run.
        path: of the file to write.
        data: labelled images, whose results are frozen too.
        force: replace an existing file.
        factories: the student's ``module:factory``, if one has to be imported.

    Raises:
        DfadcError: the file exists, student, samples and artifacts are not of one student, or an artifact or the data
            cannot be used.
        GateFailed: the run has no samples, or a network's logits are NaN or infinite.
        StorageFailed: the file cannot be written.
    """
    run.require_finished()
    if path.exists() and not force:
        raise DfadcError(f"there is a file {path} already", "--force replaces it, or choose another -o")
    manifest = check_unchanged(run.path) if (run.path / FILE_NAME).exists() else Manifest()
    samples, teacher_sha256 = _classified_samples(run), run.record()["teacher"]["sha256"]
    origins = check_lineage(run, manifest)
    if samples.recorded(STUDENT_SHA256) is None:  # the frozen logits may be another student's
        samples = with_recomputed_student(run, samples, factories=factories)
    labelled, _ = read_inputs(samples.contract, teacher_sha256, data=data, baseline=None)
    inputs = VerificationInputs(samples, labelled)
    outputs, left_out = _run_artifacts(run, manifest, inputs)
    outputs = {STUDENT: run_student(run, inputs, factories=factories), **outputs}
    correct = {name: of_samples(each.correct) for name, each in outputs.items() if isinstance(each.correct, np.ndarray)}
    baseline = Baseline(
        run=run.path.resolve().name,
        teacher_sha256=teacher_sha256,
        samples=samples,
        predictions={name: classes_of(each.outputs, samples) for name, each in outputs.items()},
        labelled=None if labelled is None else LabelledResults(labelled.sha256, correct),
    )
    thresholds = gate_thresholds(load_recipe(run.recipe))
    judge = NetworkJudge(inputs, thresholds if labelled is not None else replace(thresholds, min_accuracy=None))
    precisions = {Path(record.file).name: record.requested_precision for record in manifest.artifacts}
    notes = [*origins, *_failed_gates(judge, outputs, precisions), *_blind_spots(baseline, thresholds)]
    baseline.save(path)
    return FrozenBaseline(baseline, left_out, notes)


def _classified_samples(run: RunFolder) -> SampleSet:
    samples = load_samples(run.samples)
    if isinstance(samples, SampleSet):
        return samples
    raise DfadcError(
        f"the run {run.path} is a segmentation, and a baseline holds one prediction an image: McNemar's test needs "
        "independent pairs, which the pixels of an image are not",
        "gate on verify.min_agreement and verify.min_accuracy instead",
    )


def _run_artifacts(
    run: RunFolder, manifest: Manifest, inputs: VerificationInputs
) -> tuple[dict[str, NetworkOutputs], dict[str, str]]:
    """Outputs of the artifacts by file name, and the reasons of those that did not run."""
    outputs: dict[str, NetworkOutputs] = {}
    left_out = {path.name: NOT_LISTED for path in manifest.unlisted(run.artifacts)}
    for record in manifest.artifacts:
        name = Path(record.file).name
        try:
            outputs[name] = run_artifact(run.path / record.file, inputs)
        except (RequirementMissing, RuntimeRefused, RuntimeCrashed) as exc:
            left_out[name] = exc.message
    return outputs, left_out


def _failed_gates(
    judge: NetworkJudge, outputs: Mapping[str, NetworkOutputs], precisions: Mapping[str, str]
) -> Iterator[str]:
    """Notes on networks that fail the gates of their own run: a later network as bad as they are will pass."""
    for name, each in outputs.items():
        is_student = name == STUDENT
        result = judge.student(each) if is_student else judge.judged(ArtifactFile(name, precisions[name]), each)
        if result.judgement.verdict is Verdict.FAIL:
            network = "the fp32 student" if is_student else name
            yield f"{network} is frozen although it fails its gates: {result.judgement.reasons[0]}"


def _blind_spots(baseline: Baseline, thresholds: Thresholds) -> Iterator[str]:
    """Notes on comparisons with the baseline that must fail or cannot show a drop, whatever is predicted."""
    max_drop, labelled = thresholds.max_baseline_drop, baseline.labelled
    if max_drop is None:
        return
    names: dict[str, list[str]] = {}
    for name, classes in baseline.predictions.items():
        correct = None if labelled is None else labelled.correct[name]
        comparison = compare_with_baseline(baseline, name, classes=classes, correct=correct)
        for check in baseline_checks(comparison, max_drop):
            if check.verdict is Verdict.FAIL:
                names.setdefault(check.message, []).append(name)
    yield from (
        f"{', '.join(networks)} will fail whatever is predicted: {message}" for message, networks in names.items()
    )
    yield from unseen_drops(baseline, max_drop, with_labels=True)


def describe_frozen(frozen: FrozenBaseline) -> dict[str, Any]:
    """The frozen baseline as plain JSON values: rates of agreement with the teacher and of accuracy by network.

    The agreement is on the samples that the gate of a verification judges; null without any.
    """
    baseline, samples = frozen.baseline, frozen.baseline.samples
    gated = samples.of_source(GATED_SOURCE)
    teacher, labelled = samples.teacher_classes, baseline.labelled
    return {
        **describe_origin(baseline),
        "data": None if labelled is None else {"n": labelled.n, "sha256": labelled.sha256},
        "networks": {
            name: {
                "agreement": float(of_samples(classes == teacher)[gated].mean()) if gated.any() else None,
                "accuracy": None if labelled is None else float(labelled.correct[name].mean()),
            }
            for name, classes in baseline.predictions.items()
        },
        "left_out": frozen.left_out,
        "notes": frozen.notes,
    }
