"""Comparison D: a network against its own predictions in a baseline, by the one-sided exact McNemar test.

The gate looks at the *prior* samples, made for the teacher alone. All others were drawn by or against a generator that
the baseline's own student took part in training: they favour that student, or are chosen for its errors, and a
network distilled anew would be judged by another's weaknesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfadc.verification.agreement import of_samples
from dfadc.verification.checks import Check, checked, ungated
from dfadc.verification.mcnemar import SIGNIFICANCE, Pairs, pair, undetectable_drops

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from dfadc.verification.baseline import Baseline

#: Key of the pairs that the gate judges: those of ``GATED_SOURCE``.
GATED = "gated"
#: The only source whose samples no student influenced.
GATED_SOURCE = "prior"
NO_SAMPLES = (
    f"the baseline has no samples of source {GATED_SOURCE!r}, made for the teacher alone, and its others favour its "
    "own student: distil with verify.prior_steps above 0 and make the baseline anew"
)


@dataclass(frozen=True, slots=True)
class BaselineComparison:
    """One network against itself in the baseline.

    Args:
        agreement: with the teacher's stored predictions, by source of the baseline's samples and ``GATED``.
        accuracy: on labelled images; None if one side has none.
        num_nonfinite: samples for which its logits are now NaN or infinite.
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


def compare_with_baseline(
    baseline: Baseline, name: str, *, classes: npt.NDArray[np.int32], correct: npt.NDArray[np.bool_] | None
) -> BaselineComparison | None:
    """Pairs a network's predictions with its own in the baseline; None if the baseline does not hold the network.

    Args:
        baseline: to compare with.
        name: of the network: the fp32 student's, or an artifact's file name.
        classes: (N,) or (N, K) its predictions for the baseline's samples now; -1 if a logit is NaN or infinite.
        correct: (L,) or (L, K) correctness of its predictions for the baseline's labelled images now; None without any.
    """
    if name not in baseline.predictions:
        return None
    samples = baseline.samples
    teacher = samples.teacher_classes
    before, after = (of_samples(predictions == teacher) for predictions in (baseline.predictions[name], classes))
    parts = {GATED: samples.of_source(GATED_SOURCE)} | {name: samples.of_source(name) for name in samples.sources}
    labelled = baseline.labelled
    return BaselineComparison(
        agreement={source: pair(before[part], after[part]) for source, part in parts.items()},
        accuracy=None if labelled is None or correct is None else pair(labelled.correct[name], of_samples(correct)),
        num_nonfinite=int(of_samples(classes < 0).sum()),
    )


def baseline_checks(comparison: BaselineComparison | None, max_drop: float | None) -> tuple[Check, ...]:
    """The gates of comparison D, on agreement and, with labels, on accuracy.

    Up to ``max_drop``, in [0, 1], even a significant drop is no failure; None switches the gates off.
    """
    if comparison is None:
        return (ungated("D", "drop", "the baseline does not hold this network"),)
    if comparison.num_nonfinite:
        message = f"the logits for {comparison.num_nonfinite} of the baseline's samples are NaN or infinite"
        return (checked("D", "finite", message, held=False),)
    if max_drop is None:
        return (ungated("D", "drop", "the gate on the drop is switched off"),)
    gated = comparison.agreement[GATED]
    quantity = f"agreement with the teacher on the baseline's samples of source {GATED_SOURCE!r}"
    checks = [
        _drop_check("drop", quantity, gated, max_drop) if gated.n else checked("D", "drop", NO_SAMPLES, held=False)
    ]
    if comparison.accuracy is not None:
        checks.append(_drop_check("accuracy drop", "accuracy on labelled images", comparison.accuracy, max_drop))
    return tuple(checks)


def describe_baseline(
    baseline: Baseline, comparisons: Mapping[str, BaselineComparison | None], *, max_drop: float | None
) -> dict[str, Any]:
    """Comparison D of every network that ran now, for a report: plain values, rates may be NaN."""
    labelled = baseline.labelled
    compared = {name: entry for name, entry in comparisons.items() if entry is not None}
    with_labels = labelled is not None and any(entry.accuracy is not None for entry in compared.values())
    return {
        **describe_origin(baseline),
        "data": {"n": labelled.n, "sha256": labelled.sha256} if labelled is not None and with_labels else None,
        "max_drop": max_drop,
        "significance": SIGNIFICANCE,
        "networks": {name: entry.to_dict() for name, entry in compared.items()},
        "new": [name for name, entry in comparisons.items() if entry is None],
    }


def describe_origin(baseline: Baseline) -> dict[str, Any]:
    """A baseline's run, teacher and samples as plain JSON values."""
    samples = baseline.samples
    return {
        "run": baseline.run,
        "teacher_sha256": baseline.teacher_sha256,
        "samples": {"n": len(samples), "sha256": samples.sha256, "sources": samples.counts()},
        "gated_sources": [GATED_SOURCE] if samples.of_source(GATED_SOURCE).any() else [],
    }


def unseen_drops(baseline: Baseline, max_drop: float | None, *, with_labels: bool) -> list[str]:
    """Notes on drops beyond the limit, None if it is off, that so few pairs, also of labels, cannot show."""
    if max_drop is None:
        return []
    pairs = {"agreement": int(baseline.samples.of_source(GATED_SOURCE).sum())}
    if baseline.labelled is not None and with_labels:
        pairs["accuracy"] = baseline.labelled.n
    remarks = {quantity: undetectable_drops(n, max_drop) for quantity, n in pairs.items()}
    return [
        f"baseline: {quantity} may drop by {100 * max_drop:g} points{remark}"
        for quantity, remark in remarks.items()
        if remark
    ]


def _drop_check(gate: str, quantity: str, pairs: Pairs, max_drop: float) -> Check:
    message = f"{quantity} was {pairs.before:.2%} and is {pairs.after:.2%}: {pairs.describe(max_drop)}"
    return checked("D", gate, message, held=pairs.holds(max_drop))
