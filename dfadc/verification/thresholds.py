"""Limits of the gates. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class ExportLimits:
    """Limits of comparison A for one precision, over the samples of all sources; None switches a limit off.

    Args:
        min_agreement: least lower Wilson bound of the top-1 agreement outside ties, in [0, 1].
        max_disagreements: most disagreements outside ties.
        min_sqnr_db: least signal to quantisation noise, in dB.
        max_logit_error: largest logit error, as a share of the reference's logit range.
    """

    min_agreement: float | None = None
    max_disagreements: int | None = None
    min_sqnr_db: float | None = None
    max_logit_error: float | None = None


def default_export_limits() -> dict[str, ExportLimits]:
    """The recipe's defaults by precision: fp32 must reproduce the student's predictions, fp16 and INT8 nearly so."""
    return {
        "fp32": ExportLimits(max_disagreements=0, max_logit_error=1e-4),
        "fp16": ExportLimits(min_agreement=0.995, min_sqnr_db=40.0),
        "int8": ExportLimits(min_agreement=0.97, min_sqnr_db=20.0),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Every gate's limit, shares in [0, 1]. None switches a gate off, and the verdict then reads NOT GATED at best.

    ``min_class_agreement`` and ``min_accuracy`` are optional gates: None leaves them out without a remark.

    Args:
        min_agreement: least lower Wilson bound of the fp32 student's agreement with the teacher, or the share of the
            teacher's commonest class if that is more: predicting one class for every sample would reach it.
        min_coverage: least normalised entropy of the teacher's classes; 0.7 is five of ten classes, evenly.
        max_student_drop: largest drop of an artifact's agreement with the teacher below the fp32 student's that is no
            failure even if it is significant.
        min_class_agreement: least lower Wilson bound of the agreement with the teacher in each class.
        min_accuracy: least lower Wilson bound of the accuracy on labelled images.
        max_baseline_drop: largest drop of a network below itself in a baseline that is no failure even if it is
            significant.
        boundary_width: for segmentation, pixels within this distance of a border between the reference's classes are
            left out of comparison B and of accuracy.
        source: samples that comparisons B and C are gated on.
        export: limits of comparison A by precision; a precision that is absent has no gate.
    """

    min_agreement: float | None
    min_coverage: float | None
    max_student_drop: float | None = 0.01
    min_class_agreement: float | None = None
    min_accuracy: float | None = None
    max_baseline_drop: float | None = None
    boundary_width: int = 0
    source: str = "prior"
    export: Mapping[str, ExportLimits] = field(default_factory=default_export_limits)
