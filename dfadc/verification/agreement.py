"""Agreement of two networks' top-1 predictions. numpy only, so it runs wherever an artifact runs.

The word is agreement (candidate = reference); accuracy is kept for labels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from dfadc.verification.logit_error import Floats, logit_scale, max_scaled_error, mean_kl, scaled_sqnr_db
from dfadc.verification.rates import MIN_PER_CLASS, TIE_MARGIN, Proportion, Ties

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dfadc.contract import Task

Integers = npt.NDArray[np.integer[Any]]

#: Key of the comparison over the samples of all sources together.
ALL_SOURCES = "all"


@dataclass(frozen=True, slots=True)
class ClassAgreement(Proportion):
    """Samples that the reference puts into class ``index``; the candidate puts k of these n there too."""

    #: Plural noun of the entries, for messages.
    plural: ClassVar[str] = "classes"

    index: int

    @property
    def name(self) -> str:
        """The class, for messages."""
        return f"class {self.index}"

    @property
    def too_few(self) -> bool:
        """True if n is below ``MIN_PER_CLASS``."""
        return self.n < MIN_PER_CLASS

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the agreement may be NaN."""
        return {"class": self.index, "n": self.n, "k": self.k, **self.rates(), "too_few": self.too_few}


@dataclass(frozen=True, slots=True)
class Agreement(Ties, Proportion):
    """A candidate's logits against a reference's on the same n samples.

    Args:
        n: samples compared.
        k: samples whose top-1 class is the same; a sample with a NaN or infinite logit never counts.
        num_ties: samples whose reference margin is below ``TIE_MARGIN`` of their :func:`logit_scale`.
        top5: share of samples whose reference class is among the candidate's five highest; None for K <= 5.
        kl: mean KL(softmax(reference) || softmax(candidate)), in nats.
        sqnr_db: signal to quantisation noise of the logits in units of each sample's :func:`logit_scale`.
        max_logit_error: largest |reference - candidate| in the same units.
        per_class: one entry a class, by the reference's class.
        num_nonfinite: samples with a NaN or infinite logit on either side. ``kl``, ``sqnr_db`` and
            ``max_logit_error`` are taken over the others, and are NaN if there are none.
        num_tied_disagreements: ties whose top-1 class differs.
    """

    num_ties: int
    top5: float | None
    kl: float
    sqnr_db: float
    max_logit_error: float
    per_class: tuple[ClassAgreement, ...]
    num_nonfinite: int
    num_tied_disagreements: int = 0

    @property
    def agreement(self) -> float:
        """Top-1 agreement."""
        return self.rate

    @property
    def outside_ties(self) -> Proportion:
        """Agreement outside ties, or on everything if ties are too many."""
        return Proportion(self.num_compared, self.num_compared - self.num_differing)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names of the fields and rates; floats may be NaN or infinite."""
        return self.rates() | asdict(self) | {"per_class": [entry.to_dict() for entry in self.per_class]}


def compare(candidate_logits: Floats, reference_logits: Floats) -> Agreement:
    """Compares the logits (N, K) of a network that is judged with those of a reference for the same samples.

    Raises:
        ValueError: the shapes differ or are not (N, K) with K >= 2.
    """
    candidate, reference = check_pair(candidate_logits, reference_logits)
    n, num_classes = reference.shape
    reference_finite = np.isfinite(reference).all(axis=1)
    finite = reference_finite & np.isfinite(candidate).all(axis=1)
    classes = reference.argmax(axis=1)
    agrees = finite & (candidate.argmax(axis=1) == classes)
    candidate, reference = candidate[finite], reference[finite]
    scale = logit_scale(reference)
    top_two = np.partition(reference, num_classes - 2, axis=1)[:, -2:]
    ties = top_two[:, 1] - top_two[:, 0] < TIE_MARGIN * scale
    own = np.take_along_axis(candidate, classes[finite][:, None], axis=1)
    top5 = Proportion(n, int(((candidate > own).sum(axis=1) < 5).sum())).rate  # fewer than five are higher
    return Agreement(
        n=n,
        k=int(agrees.sum()),
        num_ties=int(ties.sum()),
        num_tied_disagreements=int((ties & ~agrees[finite]).sum()),
        top5=top5 if num_classes > 5 else None,
        kl=mean_kl(candidate, reference),
        sqnr_db=scaled_sqnr_db(candidate, reference, scale),
        max_logit_error=max_scaled_error(candidate, reference, scale),
        per_class=_per_class(agrees[reference_finite], classes[reference_finite], num_classes),
        num_nonfinite=int(n - finite.sum()),
    )


def split_by_source(source: Integers, sources: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
    """Masks (N,) of all samples (key ``ALL_SOURCES``) and of each source's; source: (N,) index into ``sources``."""
    every = {ALL_SOURCES: np.ones(len(source), np.bool_)}
    return every | {name: np.asarray(source == index) for index, name in enumerate(sources)}


def predict(logits: Floats, task: Task = "classification") -> npt.NDArray[np.int32]:
    """(N,) top-1 class of each sample, or for the task multilabel (N, K) labels: 1 on, 0 off.

    Where a logit of the sample is NaN or infinite it is -1, which is no class. logits: (N, K).
    """
    values = np.asarray(logits)
    _check_logits(values, "candidate")
    finite = np.isfinite(values).all(axis=1)
    if task == "multilabel":
        return np.where(np.asarray(finite)[:, None], values > 0, -1).astype(np.int32)
    return np.where(finite, values.argmax(axis=1), -1).astype(np.int32)


def of_samples(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(N,) flags of samples from flags (N,), or from those of their labels (N, K), which must all be set."""
    return flags if flags.ndim == 1 else np.asarray(flags.all(axis=1))


def check_pair(candidate_logits: Floats, reference_logits: Floats) -> tuple[Floats, Floats]:
    """Candidate and reference logits (N, K) in float64.

    Raises:
        ValueError: the shapes differ or are not (N, K) with K >= 2.
    """
    candidate, reference = np.asarray(candidate_logits, np.float64), np.asarray(reference_logits, np.float64)
    _check_logits(reference, "reference")
    if candidate.shape != reference.shape:
        raise ValueError(f"candidate logits are {candidate.shape}, reference logits {reference.shape}")
    return candidate, reference


def _per_class(agrees: npt.NDArray[np.bool_], classes: Integers, num_classes: int) -> tuple[ClassAgreement, ...]:
    totals = np.bincount(classes, minlength=num_classes)
    agreeing = np.bincount(classes[agrees], minlength=num_classes)
    pairs = zip(totals, agreeing, strict=True)
    return tuple(ClassAgreement(int(n), int(k), index) for index, (n, k) in enumerate(pairs))


def _check_logits(logits: npt.NDArray[Any], name: str) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"{name} logits must be (N, K) with K >= 2, got {logits.shape}")
