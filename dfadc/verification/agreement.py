"""How far one network's answers agree with another's: numpy only, so it runs wherever an artifact runs.

The word is agreement (candidate = reference); accuracy is kept for labels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]

#: Two-sided 95 % quantile of the normal distribution.
Z_95 = 1.959963984540054
#: A sample is a tie where the reference's top-1 to top-2 margin is below this share of the sample's logit scale.
TIE_MARGIN = 1e-3
#: Ties are left out of comparison A up to this share of the samples; where there are more, all samples count.
MAX_TIE_SHARE = 0.05
#: Fewer samples of a class than this say too little about the class.
MIN_PER_CLASS = 30
#: Key of the comparison over the samples of all sources together.
ALL_SOURCES = "all"


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of the proportion k/n; (0, 1) where n is 0.

    Source: Wilson 1927; unlike the normal interval it stays in [0, 1] and is sound at k = 0 and k = n.

    Raises:
        ValueError: not 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"k = {k} is not between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = k / n, Z_95 * Z_95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # Rounding may push an end past the observed rate at k = 0 and k = n, where the exact ends are 0 and 1.
    return max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))


@dataclass(frozen=True, slots=True)
class Proportion:
    """n samples, k of which count."""

    n: int
    k: int

    @property
    def unit(self) -> str:
        """What is counted, for messages."""
        return "samples"

    @property
    def rate(self) -> float:
        """Observed rate k / n; NaN where n is 0."""
        return self.k / self.n if self.n else math.nan

    @property
    def low(self) -> float:
        """Lower end of the 95 % Wilson interval."""
        return wilson_interval(self.k, self.n)[0]

    @property
    def high(self) -> float:
        """Upper end of the 95 % Wilson interval."""
        return wilson_interval(self.k, self.n)[1]

    @property
    def low_if_perfect(self) -> float:
        """The lower end that n of n would have: the most that this number of samples can show."""
        return wilson_interval(self.n, self.n)[0]


@dataclass(frozen=True, slots=True)
class Accuracy(Proportion):
    """Labelled images, k of n answered with their label."""

    @property
    def unit(self) -> str:
        """What is counted, for messages."""
        return "labelled images"

    @property
    def accuracy(self) -> float:
        """Share of the images answered with their label."""
        return self.rate

    @classmethod
    def of(cls, correct: npt.NDArray[np.bool_]) -> Accuracy:
        """Of (N,) flags: whether each image is answered with its label."""
        return cls(n=len(correct), k=int(correct.sum()))


@dataclass(frozen=True, slots=True)
class ClassAgreement(Proportion):
    """Samples that the reference puts into class ``index``, k of n put there by the candidate too."""

    index: int

    @property
    def too_few(self) -> bool:
        """Whether n is below ``MIN_PER_CLASS``."""
        return self.n < MIN_PER_CLASS

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the agreement may be NaN."""
        rates = {"agreement": self.rate, "low": self.low, "high": self.high}
        return {"class": self.index, "n": self.n, "k": self.k, **rates, "too_few": self.too_few}


class Ties:
    """Comparison A's view of the samples (or pixels) that the reference hardly decides.

    A tie is decided by less than half precision resolves: which way it falls says nothing about an export. So ties are
    left out, whether they agree or not, unless they are so many that they could hide a bad export.
    """

    __slots__ = ()

    n: int
    k: int
    num_ties: int
    num_tied_disagreements: int

    @property
    def too_many_ties(self) -> bool:
        """Whether more than ``MAX_TIE_SHARE`` of the samples are ties: then none is left out."""
        return self.num_ties > MAX_TIE_SHARE * self.n

    @property
    def num_left_out(self) -> int:
        """Ties that comparison A leaves out."""
        return 0 if self.too_many_ties else self.num_ties

    @property
    def num_differing(self) -> int:
        """Disagreements among the samples that are not left out."""
        return self.n - self.k - (0 if self.too_many_ties else self.num_tied_disagreements)


@dataclass(frozen=True, slots=True)
class Agreement(Ties, Proportion):
    """A candidate's logits against a reference's on the same n samples.

    Args:
        n: samples compared.
        k: samples whose top-1 class is the same; a sample with a NaN or infinite logit never counts.
        num_ties: samples whose reference margin is below ``TIE_MARGIN`` of their :func:`logit_scale`.
        top5: share of samples whose reference class is among the candidate's five highest; None for K <= 5.
        kl: mean KL(softmax(reference) || softmax(candidate)), in nats.
        sqnr_db: :func:`sqnr_db` of the logits in units of each sample's :func:`logit_scale`.
        max_logit_error: largest |reference - candidate| in the same units.
        per_class: one entry a class, by the reference's class.
        num_nonfinite: samples with a NaN or infinite logit on either side. ``kl``, ``sqnr_db`` and
            ``max_logit_error`` are taken over the others, and are NaN where there are none.
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
        """The samples that are no ties, or all of them where ties are too many."""
        n = self.n - self.num_left_out
        return Proportion(n, n - self.num_differing)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names of the fields and rates; floats may be NaN or infinite."""
        rates = {"agreement": self.rate, "low": self.low, "high": self.high}
        return rates | asdict(self) | {"per_class": [entry.to_dict() for entry in self.per_class]}


@dataclass(frozen=True, slots=True)
class Coverage:
    """How the teacher's answers spread over its classes.

    Args:
        counts: samples of each of the K classes, by the teacher's top-1 answer.
        num_nonfinite: samples left out because the teacher's logits are NaN or infinite.
    """

    counts: tuple[int, ...]
    num_nonfinite: int

    @property
    def n(self) -> int:
        """Samples counted."""
        return sum(self.counts)

    @property
    def entropy(self) -> float:
        """Entropy of the class histogram over the most that n samples of K classes can have, ln min(n, K).

        1 is as even as can be, 0 is one class (or fewer than two samples).
        """
        if self.n < 2:
            return 0.0
        shares = [count / self.n for count in self.counts if count]
        most = math.log(min(self.n, len(self.counts)))
        return min(1.0, max(0.0, -math.fsum(share * math.log(share) for share in shares) / most))

    @property
    def largest_share(self) -> float:
        """Share of the samples that the teacher puts into its commonest class; 0 where there are no samples."""
        return max(self.counts) / self.n if self.n else 0.0

    @property
    def num_empty(self) -> int:
        """Classes the teacher never answers with."""
        return self.counts.count(0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "n": self.n,
            "entropy": self.entropy,
            "num_empty": self.num_empty,
            "num_nonfinite": self.num_nonfinite,
            "counts": list(self.counts),
        }


def compare(candidate_logits: Floats, reference_logits: Floats) -> Agreement:
    """Compares two networks' answers to the same samples.

    Args:
        candidate_logits: (N, K), what is being judged.
        reference_logits: (N, K), what it is held against.

    Raises:
        ValueError: the shapes differ or are not (N, K) with K >= 2.
    """
    candidate, reference = np.asarray(candidate_logits, np.float64), np.asarray(reference_logits, np.float64)
    _check_logits(reference, "reference")
    if candidate.shape != reference.shape:
        raise ValueError(f"candidate logits are {candidate.shape}, reference logits {reference.shape}")
    n, num_classes = reference.shape
    reference_finite = np.isfinite(reference).all(axis=1)
    finite = reference_finite & np.isfinite(candidate).all(axis=1)
    classes = reference.argmax(axis=1)
    agrees = finite & (candidate.argmax(axis=1) == classes)
    candidate, reference, decided_alike = candidate[finite], reference[finite], agrees[finite]
    scale = logit_scale(reference)
    top_two = np.partition(reference, num_classes - 2, axis=1)[:, -2:]
    ties = top_two[:, 1] - top_two[:, 0] < TIE_MARGIN * scale
    return Agreement(
        n=n,
        k=int(agrees.sum()),
        num_ties=int(ties.sum()),
        num_tied_disagreements=int((ties & ~decided_alike).sum()),
        top5=_top5(candidate, classes[finite], n) if num_classes > 5 else None,
        kl=mean_kl(candidate, reference),
        sqnr_db=sqnr_db(*_in_units(scale, candidate, reference)),
        max_logit_error=_max_error(candidate, reference, scale),
        per_class=_per_class(agrees[reference_finite], classes[reference_finite], num_classes),
        num_nonfinite=int(n - finite.sum()),
    )


def compare_by_source(
    candidate_logits: Floats, reference_logits: Floats, *, source: Integers, sources: Sequence[str]
) -> dict[str, Agreement]:
    """:func:`compare` over all samples (key ``ALL_SOURCES``) and over each source's.

    Args:
        candidate_logits: (N, K).
        reference_logits: (N, K).
        source: (N,) index into ``sources`` of each sample.
        sources: the sources' names.
    """
    _check_length(source, reference_logits)
    parts = _parts(source, sources)
    return {name: compare(candidate_logits[part], reference_logits[part]) for name, part in parts.items()}


def measure_coverage(teacher_logits: Floats) -> Coverage:
    """Class histogram of the teacher's top-1 answers; teacher_logits: (N, K)."""
    logits = np.asarray(teacher_logits)
    _check_logits(logits, "teacher")
    finite = np.isfinite(logits).all(axis=1)
    counts = np.bincount(logits[finite].argmax(axis=1), minlength=logits.shape[1])
    return Coverage(counts=tuple(map(int, counts)), num_nonfinite=int((~finite).sum()))


def coverage_by_source(teacher_logits: Floats, *, source: Integers, sources: Sequence[str]) -> dict[str, Coverage]:
    """:func:`measure_coverage` over all samples (key ``ALL_SOURCES``) and over each source's; shapes as there."""
    _check_length(source, teacher_logits)
    return {name: measure_coverage(teacher_logits[part]) for name, part in _parts(source, sources).items()}


def predict(logits: Floats) -> npt.NDArray[np.int32]:
    """(N,) top-1 class of each sample; -1, which is no class, where a logit is NaN or infinite. logits: (N, K)."""
    values = np.asarray(logits)
    _check_logits(values, "candidate")
    return np.where(np.isfinite(values).all(axis=1), values.argmax(axis=1), -1).astype(np.int32)


def mean_kl(candidate_logits: Floats, reference_logits: Floats) -> float:
    """Mean KL(softmax(reference) || softmax(candidate)) in nats over finite (N, K) logits; NaN where N is 0."""
    if not len(reference_logits):
        return math.nan
    log_p, log_q = _log_softmax(reference_logits), _log_softmax(candidate_logits)
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()))


def logit_scale(logits: Floats) -> npt.NDArray[np.float64]:
    """(N,) scale of each sample's finite logits (N, K): the larger of its own range and the median range.

    A sample is measured by itself, so that one extreme sample neither excuses nor hides the others. The median keeps a
    sample whose logits lie close together, as those of two classes do where they are undecided, from being measured by
    nearly nothing.
    """
    ranges: npt.NDArray[np.float64] = np.ptp(np.asarray(logits, np.float64), axis=1)
    return np.maximum(ranges, float(np.quantile(ranges, 0.5, method="lower"))) if len(ranges) else ranges


def sqnr_db(candidate_logits: Floats, reference_logits: Floats) -> float:
    """Signal to quantisation noise in dB over finite logits; +inf where nothing differs, NaN where there is nothing."""
    if not reference_logits.size:
        return math.nan
    signal = float(np.square(reference_logits, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(reference_logits, candidate_logits, dtype=np.float64)).sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _parts(source: Integers, sources: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
    """Which samples belong to ``ALL_SOURCES`` and to each source: (N,) masks."""
    every = {ALL_SOURCES: np.ones(len(source), np.bool_)}
    return every | {name: np.asarray(source == index) for index, name in enumerate(sources)}


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = np.asarray(logits, np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _top5(candidate: Floats, classes: Integers, n: int) -> float:
    """Share of all n samples whose class has fewer than five higher logits; ``candidate`` holds the finite ones."""
    own = np.take_along_axis(candidate, classes[:, None], axis=1)
    return Proportion(n, int(((candidate > own).sum(axis=1) < 5).sum())).rate


def _per_class(agrees: npt.NDArray[np.bool_], classes: Integers, num_classes: int) -> tuple[ClassAgreement, ...]:
    totals = np.bincount(classes, minlength=num_classes)
    right = np.bincount(classes[agrees], minlength=num_classes)
    return tuple(ClassAgreement(int(n), int(k), index) for index, (n, k) in enumerate(zip(totals, right, strict=True)))


def _in_units(scale: npt.NDArray[np.float64], *logits: Floats) -> tuple[npt.NDArray[np.float64], ...]:
    """Logits (N, K) over each sample's scale (N,); a scale of 0, of constant logits, is taken as 1."""
    units = np.where(scale > 0, scale, 1.0)[:, None]
    return tuple(np.asarray(values / units) for values in logits)


def _max_error(candidate: Floats, reference: Floats, scale: npt.NDArray[np.float64]) -> float:
    """Largest error over its sample's scale; a constant reference (scale 0) makes any error infinite."""
    if not reference.size:
        return math.nan
    errors = np.abs(reference - candidate).max(axis=1)
    ratios = np.divide(errors, scale, out=np.where(errors > 0, math.inf, 0.0), where=scale > 0)
    return float(ratios.max())


def _check_logits(logits: npt.NDArray[Any], name: str) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"{name} logits must be (N, K) with K >= 2, got {logits.shape}")


def _check_length(values: npt.NDArray[Any], logits: npt.NDArray[Any]) -> None:
    if values.shape != (len(logits),):
        raise ValueError(f"{values.shape} values for {len(logits)} samples of logits")
