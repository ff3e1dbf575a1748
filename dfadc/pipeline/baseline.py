"""Freezing a run as what later ones must not fall behind. Imports torch only where there are labelled images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dfadc.errors import DfadcError, RequirementMissing, RuntimeCrashed, RuntimeRefused
from dfadc.pipeline.gates import gate_thresholds
from dfadc.pipeline.inference import (
    Questions,
    ask_artifact,
    ask_student,
    predicted,
    read_inputs,
    with_answers_of_today,
)
from dfadc.pipeline.provenance import check_lineage
from dfadc.recipe.load import load_recipe
from dfadc.verification.agreement import Accuracy, predict
from dfadc.verification.baseline import Baseline, LabelledResults
from dfadc.verification.gate import STUDENT, Verdict
from dfadc.verification.judge import ArtifactFile, samples_of, verify_artifact, verify_student
from dfadc.verification.pixel_samples import load_samples
from dfadc.verification.regression import GATED_SOURCE, baseline_checks, compare_with_baseline, unseen_drops
from dfadc.verification.samples import STUDENT_SHA256, SampleSet
from exporters.manifest import FILE_NAME, NOT_LISTED, Manifest, check_unchanged

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from dfadc.pipeline.inference import Answers
    from dfadc.run_folder import RunFolder
    from dfadc.verification.gate import Thresholds


class FrozenBaseline(NamedTuple):
    """A baseline that was written, the artifacts that are not in it with the reason, and notes on what it cannot do."""

    baseline: Baseline
    left_out: dict[str, str]
    notes: list[str]


def write_baseline(
    run: RunFolder, path: Path, *, data: Path | None = None, force: bool = False, factories: Collection[str] = ()
) -> FrozenBaseline:
    """Runs the fp32 student's artifacts and freezes what they answer, beside the run's samples.

    Args:
        run: a finished run.
        path: of the file to write.
        data: labelled images, whose results are frozen too.
        force: replace a baseline that is there.
        factories: the student's ``module:factory``, where one has to be imported.

    Raises:
        DfadcError: there is a file already, student, samples and artifacts are not of one student, or an artifact or
            the data cannot be used.
        GateFailed: the run has no samples, or a network answers NaN or infinity.
        StorageFailed: the file cannot be written.
    """
    run.require_finished()
    if path.exists() and not force:
        raise DfadcError(f"there is a file {path} already", "--force replaces it, or choose another -o")
    manifest = check_unchanged(run.path) if (run.path / FILE_NAME).exists() else Manifest()
    samples, teacher_sha256 = load_samples(run.samples), run.record()["teacher"]["sha256"]
    if not isinstance(samples, SampleSet):
        raise DfadcError(
            f"the run {run.path} answers every pixel, and a baseline holds one answer an image: McNemar's test asks "
            "for independent pairs, which the pixels of an image are not",
            "gate on verify.min_agreement and verify.min_accuracy instead",
        )
    origins = check_lineage(run, manifest)
    if samples.recorded(STUDENT_SHA256) is None:  # the frozen answers may be another student's
        samples = with_answers_of_today(run, samples, factories=factories)
    labelled, _ = read_inputs(samples.contract, teacher_sha256, data=data, baseline=None)
    questions = Questions(samples, labelled)
    answers = {STUDENT: ask_student(run, questions, factories=factories)}
    left_out = {path.name: NOT_LISTED for path in manifest.unlisted(run.artifacts)}
    for known in manifest.artifacts:
        name = Path(known.file).name
        try:
            answers[name] = ask_artifact(run.path / known.file, questions)
        except (RequirementMissing, RuntimeRefused, RuntimeCrashed) as exc:
            left_out[name] = exc.message
    precisions = {Path(known.file).name: known.requested_precision for known in manifest.artifacts}
    correct = {name: given.correct for name, given in answers.items() if isinstance(given.correct, np.ndarray)}
    baseline = Baseline(
        run=run.path.resolve().name,
        teacher_sha256=teacher_sha256,
        samples=samples,
        predictions={name: predicted(given.given) for name, given in answers.items()},
        labelled=None if labelled is None else LabelledResults(labelled.sha256, correct),
    )
    thresholds = gate_thresholds(load_recipe(run.recipe))
    notes = [*origins, *_failed_gates(answers, precisions, samples, thresholds), *_blind_spots(baseline, thresholds)]
    baseline.save(path)
    return FrozenBaseline(baseline, left_out, notes)


def _failed_gates(
    answers: Mapping[str, Answers], precisions: Mapping[str, str], samples: SampleSet, thresholds: Thresholds
) -> Iterator[str]:
    """Networks that fail the gates of their own run: whatever does no worse will pass beside them."""
    for name, given in answers.items():
        accuracy = Accuracy.of(given.correct) if isinstance(given.correct, np.ndarray) else None
        limits = thresholds if accuracy is not None else replace(thresholds, min_accuracy=None)
        if name == STUDENT:
            judgement = verify_student(samples, limits, accuracy=accuracy).judgement
        else:
            file = ArtifactFile(name, precisions[name])
            result = verify_artifact(file, given.given, samples=samples, thresholds=limits, accuracy=accuracy)
            judgement = result.judgement
        if judgement.verdict is Verdict.FAIL:
            who = "the fp32 student" if name == STUDENT else name
            yield f"{who} is frozen although it fails its gates: {judgement.reasons[0]}"


def _blind_spots(baseline: Baseline, thresholds: Thresholds) -> Iterator[str]:
    """Why a verification against the baseline fails or cannot show a drop, whatever the networks answer."""
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
    yield from (f"{', '.join(who)} will fail whatever is answered: {message}" for message, who in names.items())
    yield from unseen_drops(baseline, max_drop, with_labels=True)


def describe_frozen(frozen: FrozenBaseline) -> dict[str, Any]:
    """The frozen baseline as plain JSON values: rates of agreement with the teacher and of accuracy by network.

    The agreement is on the samples that the gate of a verification looks at; null where there are none.
    """
    baseline, samples = frozen.baseline, frozen.baseline.samples
    gated = samples_of(samples, GATED_SOURCE)
    teacher, labelled = predict(samples.teacher_logits), baseline.labelled
    return {
        "run": baseline.run,
        "teacher_sha256": baseline.teacher_sha256,
        "samples": {"n": len(samples), "sha256": samples.sha256, "sources": samples.counts()},
        "gated_sources": [GATED_SOURCE] if gated.any() else [],
        "data": None if labelled is None else {"n": labelled.n, "sha256": labelled.sha256},
        "networks": {
            name: {
                "agreement": float((classes == teacher)[gated].mean()) if gated.any() else None,
                "accuracy": None if labelled is None else float(labelled.correct[name].mean()),
            }
            for name, classes in baseline.predictions.items()
        },
        "left_out": frozen.left_out,
        "notes": frozen.notes,
    }
