"""From logits to judged results: the three comparisons of one artifact, by source, and its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dfadc.verification.agreement import (
    ALL_SOURCES,
    Coverage,
    Floats,
    compare,
    compare_by_source,
    coverage_by_source,
    predict,
)
from dfadc.verification.extra_gates import extra_checks
from dfadc.verification.gate import (
    Check,
    Judgement,
    Thresholds,
    failed_to_run,
    judge_artifact,
    judge_beside_teacher,
    judge_student,
    not_run,
)
from dfadc.verification.mcnemar import Pairs, pair
from dfadc.verification.pixel_agreement import (
    DenseAnswers,
    Measured,
    MeasuredAccuracy,
    compare_dense,
    cover_dense,
    pair_dense,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dfadc.verification.pixel_samples import Samples
    from dfadc.verification.pixel_scores import PairedPixels


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """What is judged: file name as shown, precision ("fp32", "fp16", "int8", ...), and size where it exists."""

    name: str
    precision: str
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ArtifactResult:
    """One artifact's comparisons and verdict; the comparisons are empty where it is NOT RUN or could not be judged.

    Args:
        artifact: which file.
        judgement: verdict with reasons.
        export: comparison A by source, with ``"all"``.
        distillation: comparison B by source, with ``"all"``.
        accuracy: on the images of --data, or None.
    """

    artifact: ArtifactFile
    judgement: Judgement
    export: Mapping[str, Measured] = field(default_factory=dict)
    distillation: Mapping[str, Measured] = field(default_factory=dict)
    accuracy: MeasuredAccuracy | None = None


@dataclass(frozen=True, slots=True)
class StudentResult:
    """The fp32 student's own comparison B and verdict, and comparison C, by source with ``"all"``."""

    judgement: Judgement
    distillation: Mapping[str, Measured]
    coverage: Mapping[str, Coverage]


def verify_student(
    samples: Samples, thresholds: Thresholds, *, accuracy: MeasuredAccuracy | None = None, extras: Sequence[Check] = ()
) -> StudentResult:
    """Judges the fp32 student from the answers frozen with the samples.

    Args:
        samples: the frozen set.
        thresholds: the gates' limits.
        accuracy: its accuracy on --data, where there is one.
        extras: outcomes of further gates, such as those of a baseline.
    """
    distillation = _compare(samples.student_answers, samples.teacher_answers, samples, thresholds.boundary_width)
    coverage = _cover(samples)
    against_teacher = _gated_agreement(distillation, samples, thresholds.source)
    judgement = judge_student(
        against_teacher=against_teacher,
        coverage=_gated_coverage(coverage, samples, thresholds.source),
        thresholds=thresholds,
        extras=[*extra_checks("the fp32 student", against_teacher, accuracy, thresholds), *extras],
    )
    return StudentResult(judgement, distillation, coverage)


def verify_artifact(
    artifact: ArtifactFile,
    answers: Floats | DenseAnswers,
    *,
    samples: Samples,
    thresholds: Thresholds,
    accuracy: MeasuredAccuracy | None = None,
    extras: Sequence[Check] = (),
) -> ArtifactResult:
    """Judges an artifact that ran.

    Args:
        artifact: which file.
        answers: its logits (N, K) to ``samples.normalised()``, or dense answers.
        samples: the frozen set.
        thresholds: the gates' limits.
        accuracy: its accuracy on --data, where there is one.
        extras: outcomes of further gates, such as those of a baseline.

    Raises:
        ValueError: the logits' shape is not that of the samples' (the artifact answers another number of classes).
    """
    export = _compare(answers, samples.student_answers, samples)
    distillation = _compare(answers, samples.teacher_answers, samples, thresholds.boundary_width)
    student = verify_student(samples, thresholds)
    against_teacher = _gated_agreement(distillation, samples, thresholds.source)
    judgement = judge_artifact(
        precision=artifact.precision,
        against_student=export[ALL_SOURCES],
        against_teacher=against_teacher,
        student_against_teacher=_gated_agreement(student.distillation, samples, thresholds.source),
        pairs=_paired(answers, samples, thresholds),
        coverage=_gated_coverage(student.coverage, samples, thresholds.source),
        thresholds=thresholds,
        extras=[*extra_checks("the artifact", against_teacher, accuracy, thresholds), *extras],
    )
    return ArtifactResult(artifact, judgement, export, distillation, accuracy)


def verify_beside_teacher(
    artifact: ArtifactFile,
    answers: Floats | DenseAnswers,
    *,
    samples: Samples,
    thresholds: Thresholds,
    accuracy: MeasuredAccuracy | None = None,
    extras: Sequence[Check] = (),
) -> ArtifactResult:
    """Judges an artifact of another student than the one that answered the samples, as :func:`verify_artifact`."""
    distillation = _compare(answers, samples.teacher_answers, samples, thresholds.boundary_width)
    against_teacher = _gated_agreement(distillation, samples, thresholds.source)
    judgement = judge_beside_teacher(
        against_teacher=against_teacher,
        coverage=_gated_coverage(_cover(samples), samples, thresholds.source),
        thresholds=thresholds,
        extras=[*extra_checks("the artifact", against_teacher, accuracy, thresholds), *extras],
    )
    return ArtifactResult(artifact, judgement, {}, distillation, accuracy)


def student_not_run(samples: Samples, reason: str) -> StudentResult:
    """The result of a student whose answers the samples do not hold, with comparison C."""
    return StudentResult(not_run(reason), {}, _cover(samples))


def samples_of(samples: Samples, source: str) -> npt.NDArray[np.bool_]:
    """(N,) which samples are of a source; none where the set does not have it."""
    if source not in samples.sources:
        return np.zeros(len(samples), np.bool_)
    return np.asarray(samples.source == samples.sources.index(source))


def artifact_not_run(artifact: ArtifactFile, reason: str) -> ArtifactResult:
    """The result of an artifact that could not run here, with the reason a person can act on."""
    return ArtifactResult(artifact, not_run(reason))


def artifact_failed(artifact: ArtifactFile, reason: str) -> ArtifactResult:
    """The result of an artifact that crashed its runtime or is not the exported one: FAIL."""
    return ArtifactResult(artifact, failed_to_run(reason))


def _compare(
    candidate: Floats | DenseAnswers, reference: Floats | DenseAnswers, samples: Samples, boundary_width: int = 0
) -> dict[str, Measured]:
    """Over the samples of all sources and of each; the width is of a band that dense answers leave out."""
    source, sources = samples.source, samples.sources
    if isinstance(candidate, DenseAnswers) and isinstance(reference, DenseAnswers):
        found = compare_dense(candidate, reference, source=source, sources=sources, boundary_width=boundary_width)
        return {**found}
    if isinstance(candidate, DenseAnswers) or isinstance(reference, DenseAnswers):
        raise TypeError("one side answers every pixel, the other every image")
    return {**compare_by_source(candidate, reference, source=source, sources=sources)}


def _paired(answers: Floats | DenseAnswers, samples: Samples, thresholds: Thresholds) -> Pairs | PairedPixels:
    """The fp32 student and an artifact against the teacher, sample by sample, on the gate's source."""
    part, width = samples_of(samples, thresholds.source), thresholds.boundary_width
    teacher, student = samples.teacher_answers, samples.student_answers
    if isinstance(teacher, DenseAnswers) and isinstance(student, DenseAnswers) and isinstance(answers, DenseAnswers):
        return pair_dense(student[part], answers[part], teacher[part], boundary_width=width)
    if isinstance(teacher, DenseAnswers) or isinstance(student, DenseAnswers) or isinstance(answers, DenseAnswers):
        raise TypeError("one side answers every pixel, the other every image")
    classes = predict(teacher[part])
    return pair(predict(student[part]) == classes, predict(answers[part]) == classes)


def _cover(samples: Samples) -> dict[str, Coverage]:
    answers = samples.teacher_answers
    if isinstance(answers, DenseAnswers):
        return cover_dense(answers, source=samples.source, sources=samples.sources)
    return coverage_by_source(answers, source=samples.source, sources=samples.sources)


def _gated_agreement(results: Mapping[str, Measured], samples: Samples, source: str) -> Measured:
    """The result on the gate's source; of no samples, which fails, where the set has none of it."""
    none = np.empty((0, samples.contract.num_classes))
    return results[source] if source in results else compare(none, none)


def _gated_coverage(results: Mapping[str, Coverage], samples: Samples, source: str) -> Coverage:
    return results[source] if source in results else Coverage((0,) * samples.contract.num_classes, 0)
