"""Comparison D: has a network fallen behind itself in a baseline? In pairs, so that a real drop is told from chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.verification.agreement import predict
from dfadc.verification.gate import Check, checked, ungated
from dfadc.verification.paired import SIGNIFICANCE, Pairs, pair

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from dfadc.verification.baseline import Baseline

#: Key of the samples that the gate looks at: those of every source but the one below.
GATED = "gated"
#: Drawn to break the baseline's own student: another may do better on them for that alone, and hide a drop elsewhere.
UNGATED_SOURCE = "adversary"


@dataclass(frozen=True, slots=True)
class BaselineComparison:
    """One network beside itself in the baseline.

    Args:
        agreement: with the teacher's stored answers, by source of the baseline's samples and ``GATED``.
        accuracy: on labelled images; None where one side has none.
        num_nonfinite: samples that it now answers with NaN or infinity.
    """

    agreement: Mapping[str, Pairs]
    accuracy: Pairs | None
    num_nonfinite: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; rates may be NaN."""
        return {
            "agreement": {source: pairs.to_dict() for source, pairs in self.agreement.items()},
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
        }


def gated_sources(baseline: Baseline) -> list[str]:
    """Sources whose samples the gate looks at, pooled."""
    return [source for source in baseline.samples.sources if source != UNGATED_SOURCE]


def compare_with_baseline(
    baseline: Baseline, name: str, *, classes: npt.NDArray[np.int32], correct: npt.NDArray[np.bool_] | None
) -> BaselineComparison | None:
    """A network against its own answers in the baseline; None where the baseline does not know it.

    Args:
        baseline: what it is held against.
        name: of the network: the fp32 student's, or an artifact's file name.
        classes: (N,) what it answers to the baseline's samples now; -1 where a logit is NaN or infinite.
        correct: (L,) whether it answers the baseline's labelled images with their label now; None without labels.
    """
    if name not in baseline.predictions:
        return None
    samples = baseline.samples
    teacher = predict(samples.teacher_logits)
    before, after = baseline.predictions[name] == teacher, classes == teacher
    parts = {GATED: np.isin(samples.source, [samples.sources.index(source) for source in gated_sources(baseline)])}
    parts |= {source: np.asarray(samples.source == index) for index, source in enumerate(samples.sources)}
    labelled = baseline.labelled
    return BaselineComparison(
        agreement={source: pair(before[part], after[part]) for source, part in parts.items()},
        accuracy=None if labelled is None or correct is None else pair(labelled.correct[name], correct),
        num_nonfinite=int((classes < 0).sum()),
    )


def baseline_checks(comparison: BaselineComparison | None, max_drop: float | None) -> tuple[Check, ...]:
    """The gates of comparison D, on agreement and, where there are labels, on accuracy.

    Args:
        comparison: of :func:`compare_with_baseline`.
        max_drop: how much may be lost, in [0, 1], before it matters whether by chance; None switches the gates off.
    """
    if comparison is None:
        return (ungated("D", "drop", "the baseline does not know this network"),)
    if comparison.num_nonfinite:
        found = f"{comparison.num_nonfinite} of the baseline's samples are answered with NaN or infinite logits"
        return (checked("D", "finite", found, held=False),)
    if max_drop is None:
        return (ungated("D", "drop", "the gate on the drop is switched off"),)
    gated = comparison.agreement[GATED]
    checks = [_drop_check("drop", "agreement with the teacher on the baseline's samples", gated, max_drop)]
    if comparison.accuracy is not None:
        checks.append(_drop_check("accuracy drop", "accuracy on labelled images", comparison.accuracy, max_drop))
    return tuple(checks)


def describe_baseline(
    baseline: Baseline, comparisons: Mapping[str, BaselineComparison | None], *, max_drop: float | None
) -> dict[str, Any]:
    """Comparison D as it stands in a report: plain values, rates may be NaN.

    Args:
        baseline: what the networks were held against.
        comparisons: every network that ran now.
        max_drop: the gate's limit.
    """
    samples, labelled = baseline.samples, baseline.labelled
    compared = {name: found for name, found in comparisons.items() if found is not None}
    with_labels = labelled is not None and any(found.accuracy is not None for found in compared.values())
    return {
        "run": baseline.run,
        "teacher_sha256": baseline.teacher_sha256,
        "samples": {"n": len(samples), "sha256": samples.sha256, "sources": samples.counts()},
        "gated_sources": gated_sources(baseline),
        "data": {"n": labelled.n, "sha256": labelled.sha256} if labelled is not None and with_labels else None,
        "max_drop": max_drop,
        "significance": SIGNIFICANCE,
        "networks": {name: found.to_dict() for name, found in compared.items()},
        "new": [name for name, found in comparisons.items() if found is None],
    }


def _drop_check(gate: str, what: str, pairs: Pairs, max_drop: float) -> Check:
    if pairs.n == 0:
        return checked("D", gate, f"no pairs to judge the {what} by", held=False)
    found = (
        f"{what} was {pairs.before:.2%} and is {pairs.after:.2%}: {pairs.lost} lost and {pairs.gained} gained of "
        f"{pairs.n}, exact McNemar p = {pairs.p_value:.2g}"
    )
    message = f"{found}; fails where more than {100 * max_drop:g} points are lost and p < {SIGNIFICANCE:g}"
    return checked("D", gate, message, held=pairs.drop <= max_drop or pairs.p_value >= SIGNIFICANCE)
