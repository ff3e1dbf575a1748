"""Comparison D: a network against its own answers in a baseline, by the one-sided exact McNemar test.

The gate looks at the *prior* samples, made for the teacher alone. All others were drawn by or against a generator that
the baseline's own student took part in training: they favour that student, or are what it fails on, and a network
distilled anew would be judged by another's weaknesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.verification.agreement import predict
from dfadc.verification.gate import Check, checked, ungated
from dfadc.verification.judge import samples_of
from dfadc.verification.mcnemar import SIGNIFICANCE, Pairs, blind_below, pair

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from dfadc.verification.baseline import Baseline

#: Key of the pairs that the gate looks at: those of the source below.
GATED = "gated"
#: The only source whose samples no student had a say in.
GATED_SOURCE = "prior"
NO_SAMPLES = (
    f"the baseline has no samples of source {GATED_SOURCE!r}, made for the teacher alone, and its others favour its "
    "own student: distil with verify.prior_steps above 0 and make the baseline anew"
)


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
    parts = {GATED: samples_of(samples, GATED_SOURCE)}
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
        max_drop: largest drop, in [0, 1], that is no failure even where it is significant; None switches the gates off.
    """
    if comparison is None:
        return (ungated("D", "drop", "the baseline does not know this network"),)
    if comparison.num_nonfinite:
        found = f"{comparison.num_nonfinite} of the baseline's samples are answered with NaN or infinite logits"
        return (checked("D", "finite", found, held=False),)
    if max_drop is None:
        return (ungated("D", "drop", "the gate on the drop is switched off"),)
    gated = comparison.agreement[GATED]
    what = f"agreement with the teacher on the baseline's samples of source {GATED_SOURCE!r}"
    checks = [_drop_check("drop", what, gated, max_drop) if gated.n else checked("D", "drop", NO_SAMPLES, held=False)]
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
        "gated_sources": [GATED_SOURCE] if samples_of(samples, GATED_SOURCE).any() else [],
        "data": {"n": labelled.n, "sha256": labelled.sha256} if labelled is not None and with_labels else None,
        "max_drop": max_drop,
        "significance": SIGNIFICANCE,
        "networks": {name: found.to_dict() for name, found in compared.items()},
        "new": [name for name, found in comparisons.items() if found is None],
    }


def unseen_drops(baseline: Baseline, max_drop: float | None, *, with_labels: bool) -> list[str]:
    """Notes on drops that the limit forbids and that so few pairs cannot show.

    Args:
        baseline: what is held against.
        max_drop: the gate's limit; None where it is off.
        with_labels: whether both sides answer labelled images.
    """
    if max_drop is None:
        return []
    pairs = {"agreement": int(samples_of(baseline.samples, GATED_SOURCE).sum())}
    if baseline.labelled is not None and with_labels:
        pairs["accuracy"] = baseline.labelled.n
    remarks = {what: blind_below(n, max_drop) for what, n in pairs.items()}
    return [
        f"baseline: {what} may drop by {100 * max_drop:g} points{remark}" for what, remark in remarks.items() if remark
    ]


def _drop_check(gate: str, what: str, pairs: Pairs, max_drop: float) -> Check:
    found = f"{what} was {pairs.before:.2%} and is {pairs.after:.2%}: {pairs.describe(max_drop)}"
    return checked("D", gate, found, held=pairs.holds(max_drop))
