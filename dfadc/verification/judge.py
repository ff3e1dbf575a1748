"""Judged results: the three comparisons of one network by source, and its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np

from dfadc.verification.agreement import ALL_SOURCES, of_samples, predict, split_by_source
from dfadc.verification.checks import absolute_checks, checked, optional_checks, ungated
from dfadc.verification.coverage import Coverage, measure_coverage, measure_label_coverage
from dfadc.verification.gate import Judgement, judge_artifact, judgement_of, not_run
from dfadc.verification.label_agreement import compare_logits
from dfadc.verification.mcnemar import Pairs, pair
from dfadc.verification.pixel_agreement import Measured, MeasuredAccuracy, compare_dense, pair_dense
from dfadc.verification.pixel_outputs import DenseOutputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from dfadc.verification.checks import Check
    from dfadc.verification.logit_error import Floats
    from dfadc.verification.pixel_samples import DenseSampleSet, Samples
    from dfadc.verification.pixel_scores import PairedPixels
    from dfadc.verification.thresholds import Thresholds


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """File name as shown, precision ("fp32", "fp16", "int8", ...), and size if the file exists."""

    name: str
    precision: str
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ArtifactResult:
    """Verdict, comparisons A and B by source with ``"all"``, and accuracy on --data of one artifact.

    The comparisons are empty if it is NOT RUN or could not be judged.
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
    """Judges the fp32 student from its outputs that are frozen with the samples.

    ``extras`` are outcomes of further gates, such as those of a baseline.
    """
    distillation = _by_source(samples.student_outputs, samples.teacher_outputs, samples, thresholds.boundary_width)
    against_teacher = _gated_agreement(distillation, samples, thresholds.source)
    checks = [
        *absolute_checks(against_teacher, _coverage(samples, samples.of_source(thresholds.source)), thresholds),
        *optional_checks("the fp32 student", against_teacher, accuracy, thresholds),
        *extras,
    ]
    return StudentResult(judgement_of(checks), distillation, coverage_by_source(samples))


def verify_artifact(
    artifact: ArtifactFile,
    outputs: Floats | DenseOutputs,
    *,
    samples: Samples,
    thresholds: Thresholds,
    accuracy: MeasuredAccuracy | None = None,
    extras: Sequence[Check] = (),
    same_student: bool = True,
) -> ArtifactResult:
    """Judges an artifact by its logits (N, K) for ``samples.normalised()``, or its dense outputs.

    ``extras`` are outcomes of further gates. Without ``same_student`` the samples hold the outputs of another fp32
    student than the artifact's, and comparison A is left out.

    Raises:
        ValueError: the outputs' shape is not that of the samples' (another number of classes).
    """
    distillation = _by_source(outputs, samples.teacher_outputs, samples, thresholds.boundary_width)
    against_teacher = _gated_agreement(distillation, samples, thresholds.source)
    gated = samples.of_source(thresholds.source)
    coverage = _coverage(samples, gated)
    extras = [*optional_checks("the artifact", against_teacher, accuracy, thresholds), *extras]
    if not same_student:
        left_out = ungated("A", "export", "left out: the samples hold the logits of another student")
        absolute = absolute_checks(against_teacher, coverage, thresholds, network="the artifact")
        return ArtifactResult(artifact, judgement_of([left_out, *absolute, *extras]), {}, distillation, accuracy)
    export = _by_source(outputs, samples.student_outputs, samples)
    judgement = judge_artifact(
        precision=artifact.precision,
        against_student=export[ALL_SOURCES],
        against_teacher=against_teacher,
        student_against_teacher=_compare(
            samples.student_outputs[gated], samples.teacher_outputs[gated], samples, thresholds.boundary_width
        ),
        pairs=_pair_with_student(outputs, samples, thresholds),
        coverage=coverage,
        thresholds=thresholds,
        extras=extras,
    )
    return ArtifactResult(artifact, judgement, export, distillation, accuracy)


def student_not_run(samples: Samples, reason: str) -> StudentResult:
    """The result of a student whose outputs the samples do not hold, with comparison C."""
    return StudentResult(not_run(reason), {}, coverage_by_source(samples))


def artifact_not_run(artifact: ArtifactFile, reason: str) -> ArtifactResult:
    """The result of an artifact that could not run here, with the reason a person can act on."""
    return ArtifactResult(artifact, not_run(reason))


def artifact_failed(artifact: ArtifactFile, reason: str) -> ArtifactResult:
    """The result of an artifact that crashed its runtime or is not the exported one: FAIL."""
    return ArtifactResult(artifact, judgement_of([checked("A", "runs", reason, held=False)]))


def coverage_by_source(samples: Samples) -> dict[str, Coverage]:
    """Comparison C over all samples and over each source's."""
    parts = split_by_source(samples.source, samples.sources)
    return {name: _coverage(samples, part) for name, part in parts.items()}


def _by_source(
    candidate: Floats | DenseOutputs, reference: Floats | DenseOutputs, samples: Samples, boundary_width: int = 0
) -> dict[str, Measured]:
    """Agreement over all samples and over each source's."""
    parts = split_by_source(samples.source, samples.sources)
    return {name: _compare(candidate[part], reference[part], samples, boundary_width) for name, part in parts.items()}


def _compare(
    candidate: Floats | DenseOutputs, reference: Floats | DenseOutputs, samples: Samples, boundary_width: int = 0
) -> Measured:
    if isinstance(candidate, DenseOutputs):
        return compare_dense(candidate, cast("DenseOutputs", reference), boundary_width=boundary_width)
    return compare_logits(candidate, cast("Floats", reference), samples.contract.task)


def _pair_with_student(
    outputs: Floats | DenseOutputs, samples: Samples, thresholds: Thresholds
) -> Pairs | PairedPixels:
    """The fp32 student and an artifact against the teacher, sample by sample, on the gate's source."""
    part = samples.of_source(thresholds.source)
    if isinstance(outputs, DenseOutputs):
        dense = cast("DenseSampleSet", samples)
        return pair_dense(
            dense.student[part], outputs[part], dense.teacher[part], boundary_width=thresholds.boundary_width
        )
    chosen = (samples.teacher_outputs[part], outputs[part], samples.student_outputs[part])
    classes, now, before = (predict(cast("Floats", logits), samples.contract.task) for logits in chosen)
    return pair(of_samples(before == classes), of_samples(now == classes))


def _gated_agreement(results: Mapping[str, Measured], samples: Samples, source: str) -> Measured:
    """The result on the gate's source; over no samples, which fails, if the set does not have it."""
    none = np.empty((0, samples.contract.num_classes))
    return results[source] if source in results else compare_logits(none, none, samples.contract.task)


def _coverage(samples: Samples, part: npt.NDArray[np.bool_]) -> Coverage:
    """Comparison C over the samples of a mask (N,)."""
    classes, contract = samples.teacher_classes[part], samples.contract
    if contract.task == "multilabel":
        return measure_label_coverage(classes)
    return measure_coverage(classes, contract.num_classes)
