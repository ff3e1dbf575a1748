"""From logits to judged results: the three comparisons of one artifact, by source, and its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dfadc.verification.agreement import (
    ALL_SOURCES,
    Accuracy,
    Agreement,
    Coverage,
    Floats,
    compare,
    compare_by_source,
    coverage_by_source,
    measure_coverage,
)
from dfadc.verification.extra_gates import extra_checks
from dfadc.verification.gate import Check, Judgement, Thresholds, judge_artifact, judge_student, not_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dfadc.verification.samples import SampleSet


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """What is judged: file name as shown, precision ("fp32", "fp16", "int8", ...), and size where it exists."""

    name: str
    precision: str
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ArtifactResult:
    """One artifact's comparisons and verdict; the comparisons are empty where it is NOT RUN.

    Args:
        artifact: which file.
        judgement: verdict with reasons.
        export: comparison A by source, with ``"all"``.
        distillation: comparison B by source, with ``"all"``.
        accuracy: on the images of --data, or None.
    """

    artifact: ArtifactFile
    judgement: Judgement
    export: Mapping[str, Agreement] = field(default_factory=dict)
    distillation: Mapping[str, Agreement] = field(default_factory=dict)
    accuracy: Accuracy | None = None


@dataclass(frozen=True, slots=True)
class StudentResult:
    """The fp32 student's own comparison B and verdict, and comparison C, by source with ``"all"``."""

    judgement: Judgement
    distillation: Mapping[str, Agreement]
    coverage: Mapping[str, Coverage]


def verify_student(
    samples: SampleSet, thresholds: Thresholds, *, accuracy: Accuracy | None = None, extras: Sequence[Check] = ()
) -> StudentResult:
    """Judges the fp32 student from the answers frozen with the samples.

    Args:
        samples: the frozen set.
        thresholds: the gates' limits.
        accuracy: its accuracy on --data, where there is one.
        extras: outcomes of further gates, such as those of a baseline.
    """
    distillation = _compare(samples.student_logits, samples.teacher_logits, samples)
    coverage = coverage_by_source(samples.teacher_logits, source=samples.source, sources=samples.sources)
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
    logits: Floats,
    *,
    samples: SampleSet,
    thresholds: Thresholds,
    accuracy: Accuracy | None = None,
    extras: Sequence[Check] = (),
) -> ArtifactResult:
    """Judges an artifact that ran.

    Args:
        artifact: which file.
        logits: (N, K), its answers to ``samples.normalised()``.
        samples: the frozen set.
        thresholds: the gates' limits.
        accuracy: its accuracy on --data, where there is one.
        extras: outcomes of further gates, such as those of a baseline.

    Raises:
        ValueError: the logits' shape is not that of the samples' (the artifact answers another number of classes).
    """
    export = _compare(logits, samples.student_logits, samples)
    distillation = _compare(logits, samples.teacher_logits, samples)
    student = verify_student(samples, thresholds)
    against_teacher = _gated_agreement(distillation, samples, thresholds.source)
    judgement = judge_artifact(
        precision=artifact.precision,
        against_student=export[ALL_SOURCES],
        against_teacher=against_teacher,
        student_against_teacher=_gated_agreement(student.distillation, samples, thresholds.source),
        coverage=_gated_coverage(student.coverage, samples, thresholds.source),
        thresholds=thresholds,
        extras=[*extra_checks("the artifact", against_teacher, accuracy, thresholds), *extras],
    )
    return ArtifactResult(artifact, judgement, export, distillation, accuracy)


def artifact_not_run(artifact: ArtifactFile, reason: str) -> ArtifactResult:
    """The result of an artifact that could not run here, with the reason a person can act on."""
    return ArtifactResult(artifact, not_run(reason))


def _compare(candidate: Floats, reference: Floats, samples: SampleSet) -> dict[str, Agreement]:
    return compare_by_source(candidate, reference, source=samples.source, sources=samples.sources)


def _gated_agreement(results: Mapping[str, Agreement], samples: SampleSet, source: str) -> Agreement:
    """The result on the gate's source; of no samples, which fails, where the set has none of it."""
    return results[source] if source in results else compare(samples.teacher_logits[:0], samples.teacher_logits[:0])


def _gated_coverage(results: Mapping[str, Coverage], samples: SampleSet, source: str) -> Coverage:
    return results[source] if source in results else measure_coverage(samples.teacher_logits[:0])
