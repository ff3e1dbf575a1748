"""The gates one by one: each compares a measurement with its limit. Standard library only.

Each gate belongs to one of the comparisons, which are never blended: A export (artifact against the fp32 student),
B distillation (against the teacher), C coverage (the teacher's classes); and on request D baseline (against an earlier
run, in pairs) and E accuracy (on labelled images). A gate fails closed: NaN holds no limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal

from dfadc.errors import some_of
from dfadc.verification.thresholds import ExportLimits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dfadc.verification.agreement import ClassAgreement
    from dfadc.verification.coverage import Coverage
    from dfadc.verification.mcnemar import Pairs
    from dfadc.verification.pixel_agreement import Measured, MeasuredAccuracy
    from dfadc.verification.pixel_scores import ClassScore, PairedPixels
    from dfadc.verification.rates import Proportion
    from dfadc.verification.thresholds import Thresholds

Comparison = Literal["A", "B", "C", "D", "E"]
COMPARISON_NAMES: Mapping[Comparison, str] = {
    "A": "A export",
    "B": "B distillation",
    "C": "C coverage",
    "D": "D baseline",
    "E": "E accuracy",
}


class Verdict(str, Enum):
    """Result of a gate or of all gates. Only PASS means that every gate was on, was judged and held."""

    __str__ = str.__str__  # As enum.StrEnum has it, which Python 3.10 lacks.

    PASS = "PASS"  # noqa: S105
    FAIL = "FAIL"
    NOT_RUN = "NOT RUN"
    NOT_GATED = "NOT GATED"


@dataclass(frozen=True, slots=True)
class Check:
    """One gate's outcome, with the measured value and the limit in its message."""

    comparison: Comparison
    gate: str
    verdict: Verdict
    message: str


def checked(comparison: Comparison, gate: str, message: str, *, held: bool) -> Check:
    """PASS if the gate ``held``, else FAIL; the message begins with the comparison's name."""
    verdict = Verdict.PASS if held else Verdict.FAIL
    return Check(comparison, gate, verdict, f"{COMPARISON_NAMES[comparison]}: {message}")


def ungated(comparison: Comparison, gate: str, message: str) -> Check:
    """NOT GATED: the gate is switched off, or there is nothing to compare with."""
    return Check(comparison, gate, Verdict.NOT_GATED, f"{COMPARISON_NAMES[comparison]}: {message}")


def remark_checks(remark: str) -> tuple[Check, ...]:
    """NOT GATED with a session's remark that its runtime did not compute as it does by default; none without one."""
    return (ungated("A", "runtime", remark),) if remark else ()


def export_checks(measured: Measured, precision: str, thresholds: Thresholds) -> list[Check]:
    """Comparison A: the limits of this precision."""
    unusable = _unusable("A", measured, "the artifact or the fp32 student")
    if unusable is not None:
        return [unusable]
    limits = thresholds.export.get(precision, ExportLimits())
    ties = f"tied {measured.tie_unit}" if measured.tie_unit else "ties"
    outside = f" outside {measured.num_left_out:,} {ties}" if measured.num_left_out else ""
    checks = []
    if measured.too_many_ties and measured.k != measured.n:
        share, unit = measured.num_ties / measured.num_decisions, measured.tie_unit or measured.unit
        message = (
            f"{measured.num_ties} of {measured.num_decisions} {unit} are ties ({share:.1%}): the fp32 student hardly "
            "decides there; none of them is left out"
        )
        checks.append(ungated("A", "ties", message))
    if limits.max_disagreements is not None:
        message = (
            f"the predictions of {measured.num_differing} of {measured.num_compared} "
            f"{measured.unit}{outside} differ from the fp32 student's, at most {limits.max_disagreements}"
        )
        held = measured.num_differing <= limits.max_disagreements
        checks.append(checked("A", "disagreements", message, held=held))
    if limits.min_agreement is not None:
        claim = "the artifact agrees with the fp32 student"
        checks.append(_bound_check("A", measured.outside_ties, limits.min_agreement, claim, outside=outside))
    if limits.min_sqnr_db is not None:
        message = f"SQNR against the fp32 student is {measured.sqnr_db:.1f} dB, at least {limits.min_sqnr_db:g} dB"
        checks.append(checked("A", "sqnr", message, held=measured.sqnr_db >= limits.min_sqnr_db))
    if limits.max_logit_error is not None:
        message = (
            f"largest logit error is {measured.max_logit_error:.2g} of its sample's logit range, at most "
            f"{limits.max_logit_error:g}"
        )
        checks.append(checked("A", "logit error", message, held=measured.max_logit_error <= limits.max_logit_error))
    if limits == ExportLimits():
        checks.append(ungated("A", "export", f"no limit is set for precision {precision!r}"))
    return checks


def drop_check(artifact: Measured, student: Measured, pairs: Pairs | PairedPixels, thresholds: Thresholds) -> Check:
    """Comparison B, relative and paired: the artifact against its own fp32 student; a drop by chance is no failure."""
    if artifact.n != student.n:
        raise ValueError(f"not paired: artifact on {artifact.n} samples, fp32 student on {student.n}")
    unusable = _unusable("B", artifact, "the artifact or the teacher", thresholds.source)
    if unusable is not None:
        return unusable
    if thresholds.max_student_drop is None:
        return ungated("B", "drop", "the gate on the drop is switched off")
    message = (
        f"agreement with the teacher is {artifact.agreement:.2%}, the fp32 student's {student.agreement:.2%}: "
        f"{100 * pairs.drop:+.2f} points under it; {pairs.describe(thresholds.max_student_drop)}"
    )
    return checked("B", "drop", message, held=pairs.holds(thresholds.max_student_drop))


def absolute_checks(
    measured: Measured, coverage: Coverage, thresholds: Thresholds, *, network: str = "the fp32 student"
) -> list[Check]:
    """Comparisons B and C: agreement above the limit and above one constant class, and the teacher's class entropy."""
    return [_agreement_check(measured, coverage, thresholds, network), _coverage_check(coverage, thresholds)]


def optional_checks(
    network: str, against_teacher: Measured, accuracy: MeasuredAccuracy | None, thresholds: Thresholds
) -> list[Check]:
    """The gates on each class and on accuracy, if they are on; the accuracy is None without labelled images.

    ``network`` is its noun phrase in the messages, ``against_teacher`` its agreement on the gate's source.
    """
    checks = []
    if thresholds.min_class_agreement is not None and against_teacher.n:
        checks.append(_class_check(network, against_teacher.per_class, thresholds.min_class_agreement))
    if thresholds.min_accuracy is not None:
        checks.append(_accuracy_check(network, accuracy, thresholds.min_accuracy))
    return checks


def _agreement_check(measured: Measured, coverage: Coverage, thresholds: Thresholds, network: str) -> Check:
    """The network agrees often enough, and more often than one that predicts the teacher's commonest class alone."""
    unusable = _unusable("B", measured, f"{network} or the teacher", thresholds.source)
    if unusable is not None:
        return unusable
    if thresholds.min_agreement is None:
        return ungated("B", "agreement", "the gate on agreement is switched off")
    claim = f"{network} agrees with the teacher (source {thresholds.source})"
    if coverage.largest_share > thresholds.min_agreement:
        constant = "one class" if coverage.sets is None else "one set of labels"
        why = f", which {constant} for all of them would reach"
        return _bound_check("B", measured, coverage.largest_share, claim, why=why)
    return _bound_check("B", measured, thresholds.min_agreement, claim)


def _coverage_check(coverage: Coverage, thresholds: Thresholds) -> Check:
    if coverage.n == 0:
        return checked("C", "coverage", f"no samples of source {thresholds.source!r} to judge", held=False)
    if thresholds.min_coverage is None:
        return ungated("C", "coverage", "the gate on coverage is switched off")
    quantity, empty = "class entropy", "classes never seen"
    if coverage.sets is not None:
        quantity, empty = "entropy of the sets of labels", "states of labels never seen, and each must be"
    message = (
        f"normalised {quantity} of the teacher's predictions is {coverage.entropy:.3f} "
        f"({coverage.num_empty} of {len(coverage.counts)} {empty}), at least {thresholds.min_coverage:g}"
    )
    held = coverage.is_complete and coverage.entropy >= thresholds.min_coverage
    return checked("C", "coverage", message, held=held)


def _class_check(network: str, per_class: Sequence[ClassAgreement | ClassScore], limit: float) -> Check:
    """The lower bound of each class; a class with too few samples to show the limit is named as not judged."""
    judged = [entry for entry in per_class if not entry.too_few and entry.low_if_perfect >= limit]
    few, plural = [entry for entry in per_class if entry not in judged], per_class[0].plural
    unjudged = f"; {len(few)} of {len(per_class)} {plural} have too few samples: {_some(few)}" if few else ""
    if not judged:
        message = f"none of the {plural} has enough samples to judge {network}{unjudged}"
        return checked("B", "class agreement", message, held=False)
    worst = min(judged, key=lambda entry: entry.low)
    below = [entry for entry in judged if not entry.low >= limit]
    outcome = f"{len(below)} {plural} fall below it: {_some(below)}" if below else f"all judged {plural} hold it"
    message = (
        f"{network} agrees with the teacher least in {worst.name}, on {worst.rate:.2%} "
        f"[{worst.low:.2%}, {worst.high:.2%}] of {worst.n} samples, lower bound at least {limit:.2%}; "
        f"{outcome}{unjudged}"
    )
    return checked("B", "class agreement", message, held=not below)


def _accuracy_check(network: str, measured: MeasuredAccuracy | None, limit: float) -> Check:
    """The lower bound of the accuracy."""
    if measured is None:
        return ungated("E", "accuracy", f"there are no labelled images to judge {network} by")
    message = (
        f"{network} classifies {measured.accuracy:.2%} [{measured.low:.2%}, {measured.high:.2%}] of {measured.n} "
        f"{measured.unit} correctly, lower bound at least {limit:.2%}"
    )
    return checked("E", "accuracy", message, held=measured.low >= limit)


def _unusable(comparison: Comparison, measured: Measured, networks: str, source: str | None = None) -> Check | None:
    """A failed check if there are no samples or a logit is not finite."""
    if measured.n == 0:
        where = "" if source is None else f" of source {source!r}"
        return checked(comparison, "samples", f"no samples{where} to judge", held=False)
    if measured.num_nonfinite:
        message = f"{measured.num_nonfinite} of {measured.n} samples have NaN or infinite logits from {networks}"
        return checked(comparison, "finite", message, held=False)
    return None


def _bound_check(
    comparison: Comparison,
    measured: Measured | Proportion,
    limit: float,
    claim: str,
    *,
    outside: str = "",
    why: str = "",
) -> Check:
    """The lower bound of a rate against a limit; ``outside`` names the samples that are left out of it."""
    message = (
        f"{claim} on {measured.rate:.2%} [{_distinct_percent(measured.low, limit)}, {measured.high:.2%}] of "
        f"{measured.n} {measured.unit}{outside}, lower bound at least {limit:.2%}{why}"
    )
    if measured.low_if_perfect < limit:
        message += (
            f" (even {measured.n} of {measured.n} would only show {measured.low_if_perfect:.2%}: take more samples)"
        )
    return checked(comparison, "agreement", message, held=measured.low >= limit)


def _distinct_percent(bound: float, limit: float) -> str:
    """A percentage with the two decimals or more that show on which side of the limit it lies."""
    digits = next((digits for digits in range(2, 9) if f"{bound:.{digits}%}" != f"{limit:.{digits}%}"), 2)
    return f"{bound:.{digits}%}"


def _some(classes: Sequence[ClassAgreement | ClassScore]) -> str:
    return some_of([entry.name.removeprefix("class ") for entry in classes])
