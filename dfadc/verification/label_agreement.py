"""Agreement and accuracy of networks that give an image several labels (multi-label). numpy only.

A label is on where its logit is above 0, its sigmoid above one half. Networks agree on a sample where they agree on
every label. Each label has two states, which take the place of classes: number 2·label is off, 2·label + 1 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.verification.agreement import Agreement, ClassAgreement, check_pair, compare
from dfadc.verification.logit_error import Floats, logit_scale, max_scaled_error, mean_kl, scaled_sqnr_db
from dfadc.verification.rates import TIE_MARGIN, Accuracy, Proportion

if TYPE_CHECKING:
    from dfadc.contract import Task

Flags = npt.NDArray[np.bool_]


class StateAgreement(ClassAgreement):
    """Samples in which the reference has a label in one state; the candidate has it in the same in k of these n."""

    __slots__ = ()
    plural = "states of labels"

    @property
    def name(self) -> str:
        """Label and state, as in ``label 3 on``."""
        label, is_on = divmod(self.index, 2)
        return f"label {label} {'on' if is_on else 'off'}"


class LabelAgreement(Agreement):
    """A candidate's labels against a reference's on the same n samples.

    The fields are those of :class:`Agreement`, except that

    - k counts the samples in which every label is the same;
    - ``num_ties`` counts labels, not samples: reference logits nearer to 0 than ``TIE_MARGIN`` of their sample's scale.
      Comparison A leaves out those labels, no sample;
    - ``num_tied_disagreements`` counts the samples that differ in such labels alone;
    - ``kl`` is the sum over the labels of KL(sigmoid(reference) || sigmoid(candidate)), in nats;
    - ``per_class`` has two entries a label, off and on.
    """

    __slots__ = ()
    tie_unit = "labels"

    @property
    def num_decisions(self) -> int:
        """Labels of all samples."""
        return self.n * len(self.per_class) // 2

    @property
    def num_compared(self) -> int:
        """Every sample is compared, by its labels that are no ties."""
        return self.n


def compare_labels(candidate_logits: Floats, reference_logits: Floats) -> LabelAgreement:
    """Compares the labels of a network that is judged with a reference's for the same samples; both logits (N, K).

    Raises:
        ValueError: the shapes differ or are not (N, K) with K >= 2.
    """
    candidate, reference = check_pair(candidate_logits, reference_logits)
    n, num_labels = reference.shape
    reference_finite = np.isfinite(reference).all(axis=1)
    finite = np.asarray(reference_finite & np.isfinite(candidate).all(axis=1))
    on = reference > 0
    same = ((candidate > 0) == on) & finite[:, None]
    per_state = _per_state(same[reference_finite], on[reference_finite])
    candidate, reference, same = candidate[finite], reference[finite], same[finite]
    scale = logit_scale(np.pad(reference, ((0, 0), (0, 1))))
    ties = np.abs(reference) < TIE_MARGIN * scale[:, None]
    agrees = same.all(axis=1)
    return LabelAgreement(
        n=n,
        k=int(agrees.sum()),
        num_ties=int(ties.sum()),
        num_tied_disagreements=int(((same | ties).all(axis=1) & ~agrees).sum()),
        top5=None,
        kl=num_labels * mean_kl(_as_pairs(candidate), _as_pairs(reference)),
        sqnr_db=scaled_sqnr_db(candidate, reference, scale),
        max_logit_error=max_scaled_error(candidate, reference, scale),
        per_class=per_state,
        num_nonfinite=int(n - finite.sum()),
    )


def compare_logits(candidate_logits: Floats, reference_logits: Floats, task: Task) -> Agreement:
    """:func:`compare_labels` for several labels an image, :func:`compare` for one class; logits (N, K)."""
    rule = compare_labels if task == "multilabel" else compare
    return rule(candidate_logits, reference_logits)


@dataclass(frozen=True, slots=True)
class LabelAccuracy(Accuracy):
    """Labelled images of which k have every label right; ``per_label`` counts those that have each label right."""

    per_label: tuple[Proportion, ...] = ()

    @classmethod
    def of(cls, correct: Flags) -> LabelAccuracy:
        """Accuracy from one flag for each label of each image; correct: (N, K)."""
        n = len(correct)
        per_label = tuple(Proportion(n, int(count)) for count in correct.sum(axis=0))
        return cls(n, int(correct.all(axis=1).sum()), per_label)

    def labels_dict(self) -> dict[str, Any]:
        """Mean accuracy of a label, and each label's, under the report's keys; rates may be NaN."""
        rates = [entry.rate for entry in self.per_label]
        entries = [
            {"label": label, "n": entry.n, "k": entry.k, "accuracy": entry.rate, "low": entry.low, "high": entry.high}
            for label, entry in enumerate(self.per_label)
        ]
        return {"mean": float(np.mean(rates)) if rates else None, "per_label": entries}


def _as_pairs(logits: Floats) -> Floats:
    """(N·K, 2) logits [0, z] of off and on."""
    return np.stack([np.zeros(logits.size), logits.reshape(-1)], axis=1)


def _per_state(same: Flags, on: Flags) -> tuple[StateAgreement, ...]:
    """Agreement by label and state; both flags (N, K)."""
    states = np.stack([~on, on], axis=2)
    totals = states.sum(axis=0).reshape(-1)
    agreeing = (states & same[:, :, None]).sum(axis=0).reshape(-1)
    pairs = zip(totals, agreeing, strict=True)
    return tuple(StateAgreement(int(n), int(k), index) for index, (n, k) in enumerate(pairs))
