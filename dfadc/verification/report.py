"""The report: the results of a verification as one versioned JSON document."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from dfadc.storage import without_nan
from dfadc.verification.gate import STUDENT, Judgement, conclude
from dfadc.verification.label_agreement import LabelAccuracy
from dfadc.verification.pixel_scores import PixelScores

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from dfadc.errors import DfadcError
    from dfadc.verification.coverage import Coverage
    from dfadc.verification.judge import ArtifactResult, StudentResult
    from dfadc.verification.pixel_agreement import Measured, MeasuredAccuracy
    from dfadc.verification.pixel_samples import Samples
    from dfadc.verification.rates import Rate
    from dfadc.verification.thresholds import Thresholds

SCHEMA = "dfadc.verification/1"
Report = dict[str, Any]
_FAILURE = ("message", "hint", "exit_code")


class LabelledAccuracy(NamedTuple):
    """Teacher's and fp32 student's accuracy on the images of --data."""

    teacher: MeasuredAccuracy
    student: MeasuredAccuracy


def build_report(  # noqa: PLR0913 -- keywords, each of them a part of the document
    *,
    samples: Samples,
    thresholds: Thresholds,
    student: StudentResult,
    artifacts: Sequence[ArtifactResult],
    accuracy: LabelledAccuracy | None = None,
    required: Collection[str] = (),
    failure: DfadcError | None = None,
    run: Mapping[str, Any] | None = None,
    additions: Mapping[str, Any] | None = None,
) -> Report:
    """The whole verification as JSON values: no NaN and no infinity, those are null.

    ``sqnr_db`` is null if nothing differs (``max_logit_error`` is then 0) or nothing could be compared. ``failure``
    kept an artifact from being exported; ``run`` holds plain values on the run, and ``additions`` ``baseline`` (of
    :func:`dfadc.verification.regression.describe_baseline`) and ``notes`` for the reader.
    """
    verdicts = {STUDENT: student.judgement.verdict} | {r.artifact.name: r.judgement.verdict for r in artifacts}
    conclusion = conclude(verdicts, required=required, failure=failure)
    coverage = {source: value.to_dict() for source, value in student.coverage.items()}
    report = {
        "schema": SCHEMA,
        "verdict": str(conclusion.verdict),
        "headline": conclusion.headline,
        "exit_code": conclusion.exit_code,
        "reasons": list(conclusion.reasons),
        "failure": None if failure is None else {name: getattr(failure, name) for name in _FAILURE},
        "run": dict(run or {}),
        "gate": asdict(thresholds) | {"required": sorted(required)},
        "samples": {"n": len(samples), "sha256": samples.sha256, "sources": samples.counts()},
        "task": samples.contract.task,
        "class_names": None if samples.contract.class_names is None else list(samples.contract.class_names),
        "coverage": coverage,
        "student": _judged(student.judgement)
        | _gated(student.distillation, thresholds.source)
        | {"comparisons": {"B": _by_source(student.distillation), "C": coverage}},
        "artifacts": {result.artifact.name: _artifact(result, coverage, thresholds.source) for result in artifacts},
        "accuracy": _labelled_accuracy(accuracy),
        "baseline": None,
        "notes": [],
        **(additions or {}),
    }
    cleaned: Report = without_nan(report)
    return cleaned


def _artifact(result: ArtifactResult, coverage: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {
        **_judged(result.judgement),
        "precision": result.artifact.precision,
        "size_bytes": result.artifact.size_bytes,
        **_gated(result.distillation, source),
        **_rate("accuracy", result.accuracy),
        **_parts(result.accuracy),
        "comparisons": {
            "A": _by_source(result.export),
            "B": _by_source(result.distillation),
            "C": dict(coverage) if result.distillation else {},
        },
    }


def _judged(judgement: Judgement) -> dict[str, Any]:
    checks = [asdict(check) | {"verdict": str(check.verdict)} for check in judgement.checks]
    return {"verdict": str(judgement.verdict), "reasons": list(judgement.reasons), "checks": checks}


def _gated(distillation: Mapping[str, Measured], source: str) -> dict[str, Any]:
    """The headline: comparison B on the gate's source, null if nothing was compared."""
    measured = distillation.get(source)
    return _rate("agreement", measured if measured is not None and measured.n else None)


def _rate(name: str, measured: Rate | None) -> dict[str, float | None]:
    """A rate and its interval under the report's keys; null if nothing was measured."""
    values = (None,) * 3 if measured is None else (measured.rate, measured.low, measured.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _by_source(results: Mapping[str, Measured] | Mapping[str, Coverage]) -> dict[str, Any]:
    return {source: result.to_dict() for source, result in results.items()}


def _labelled_accuracy(accuracy: LabelledAccuracy | None) -> dict[str, Any] | None:
    if accuracy is None:
        return None
    values: dict[str, Any] = {"n": accuracy.teacher.n, "unit": accuracy.teacher.unit}
    for name, measured in zip(LabelledAccuracy._fields, accuracy, strict=True):
        values |= _rate(name, measured) | {f"{name}_{part}": entry for part, entry in _parts(measured).items()}
    return values


def _parts(accuracy: MeasuredAccuracy | None) -> dict[str, Any]:
    """Accuracy of the classes of pixels, or of each label; nothing for one class an image."""
    if isinstance(accuracy, PixelScores):
        return {"iou": {**accuracy.iou_dict(), "per_class": [entry.to_dict() for entry in accuracy.per_class]}}
    return {"labels": accuracy.labels_dict()} if isinstance(accuracy, LabelAccuracy) else {}
