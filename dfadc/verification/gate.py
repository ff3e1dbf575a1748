"""Thresholds and verdicts: standard library only, fails closed, and never passes what was not judged.

Each gate belongs to one of the comparisons, which are never blended: A export (artifact against the fp32 student),
B distillation (against the teacher), C coverage (the teacher's classes); and where they are asked for, D baseline
(against an earlier run, in pairs) and E accuracy (on labelled images).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # At run time this file needs no other: a device kit carries it as it is.
    from collections.abc import Collection, Mapping, Sequence

    from dfadc.verification.agreement import Coverage, Proportion
    from dfadc.verification.mcnemar import Pairs
    from dfadc.verification.pixel_agreement import Measured
    from dfadc.verification.pixel_scores import PairedPixels

Comparison = Literal["A", "B", "C", "D", "E"]

EXIT_PASSED = 0
EXIT_GATE_FAILED = 3
EXIT_REQUIREMENT_MISSING = 4
#: The fp32 student's name among the verdicts.
STUDENT = "student"


class Verdict(str, Enum):
    """Knowledge about an artifact. Only PASS means that every gate was on, was judged and held."""

    __str__ = str.__str__  # As enum.StrEnum has it, which Python 3.10 lacks.

    PASS = "PASS"  # noqa: S105
    FAIL = "FAIL"
    NOT_RUN = "NOT RUN"
    NOT_GATED = "NOT GATED"


@dataclass(frozen=True, slots=True)
class ExportLimits:
    """Comparison A for one precision, over the samples of all sources; None switches a limit off.

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
    """The recipe's defaults by precision: fp32 must answer as the student does, fp16 and INT8 nearly so."""
    return {
        "fp32": ExportLimits(max_disagreements=0, max_logit_error=1e-4),
        "fp16": ExportLimits(min_agreement=0.995, min_sqnr_db=40.0),
        "int8": ExportLimits(min_agreement=0.97, min_sqnr_db=20.0),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Every gate's limit, shares in [0, 1]. None switches a gate off, and the verdict then reads NOT GATED at best.

    The gates of ``min_class_agreement`` and ``min_accuracy`` are extras: where they are off, nothing is said.

    Args:
        min_agreement: least lower Wilson bound of the fp32 student's agreement with the teacher; the share of the
            teacher's commonest class, where that is more: one class for every sample would reach it.
        min_coverage: least normalised entropy of the teacher's classes; 0.7 is five of ten classes, evenly.
        max_student_drop: how far an artifact's agreement with the teacher may lie under the fp32 student's before it
            matters whether by chance.
        min_class_agreement: least lower Wilson bound of the agreement with the teacher in each class.
        min_accuracy: least lower Wilson bound of the accuracy on labelled images.
        max_baseline_drop: how far a network may fall under itself in a baseline before it matters whether by chance.
        boundary_width: of dense answers, pixels within so many of a border between the reference's classes do not
            count in comparison B and in accuracy.
        source: which samples comparisons B and C are gated on.
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


@dataclass(frozen=True, slots=True)
class Check:
    """One gate's outcome, with the measured value and the limit in its message."""

    comparison: Comparison
    gate: str
    verdict: Verdict
    message: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, why it is not PASS, and every check behind it."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that did not keep the rest from being verified: its message, how to fix it, and its exit code."""

    message: str
    hint: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The outcome of a whole verification.

    JSON, JUnit, summary, annotations, verdict line and exit code all state this one.

    Args:
        verdict: over student and artifacts.
        exit_code: of the process.
        reasons: why the verdict is not PASS.
        headline: the verdict, and how many of the artifacts ran where it is not all.
    """

    verdict: Verdict
    exit_code: int
    reasons: tuple[str, ...] = ()
    headline: str = ""


def remark_checks(remark: str) -> tuple[Check, ...]:
    """A finding where a runtime did not compute as it does by default: the artifact is then NOT GATED at best."""
    return (ungated("A", "runtime", remark),) if remark else ()


def not_run(reason: str) -> Judgement:
    """The judgement of an artifact that could not run here."""
    return Judgement(Verdict.NOT_RUN, (reason,))


def failed_to_run(reason: str) -> Judgement:
    """The judgement of an artifact that crashed its runtime or is not the exported one, so no NOT RUN."""
    return _judgement([checked("A", "runs", reason, held=False)])


def judge_student(
    *, against_teacher: Measured, coverage: Coverage, thresholds: Thresholds, extras: Sequence[Check] = ()
) -> Judgement:
    """Judges the fp32 student by the absolute gates.

    Args:
        against_teacher: the fp32 student against the teacher on the gate's source.
        coverage: the teacher's classes on the gate's source.
        thresholds: the limits.
        extras: outcomes of the gates that were asked for besides.
    """
    return _judgement([*_student_checks(against_teacher, coverage, thresholds), *extras])


def judge_artifact(
    *,
    precision: str,
    against_student: Measured,
    against_teacher: Measured,
    student_against_teacher: Measured,
    pairs: Pairs | PairedPixels,
    coverage: Coverage,
    thresholds: Thresholds,
    extras: Sequence[Check] = (),
) -> Judgement:
    """Judges one artifact. It fails with its student: an exact copy of a student that fell short is no pass.

    Args:
        precision: "fp32", "fp16", "int8", ...: picks the limits of comparison A.
        against_student: comparison A over the samples of all sources.
        against_teacher: comparison B on the gate's source.
        student_against_teacher: the fp32 student's own, on the same samples.
        pairs: the two of them sample by sample, the student before and the artifact after.
        coverage: comparison C on the gate's source.
        thresholds: the limits.
        extras: outcomes of the gates that were asked for besides.

    Raises:
        ValueError: artifact and student were not compared on the same number of samples.
    """
    return _judgement(
        [
            *_export_checks(against_student, precision, thresholds),
            _drop_check(against_teacher, student_against_teacher, pairs, thresholds),
            *_student_checks(student_against_teacher, coverage, thresholds),
            *extras,
        ]
    )


def judge_beside_teacher(
    *, against_teacher: Measured, coverage: Coverage, thresholds: Thresholds, extras: Sequence[Check] = ()
) -> Judgement:
    """Judges an artifact on samples that another student answered: there is no comparison A and no drop.

    Args:
        against_teacher: comparison B on the gate's source.
        coverage: comparison C on the gate's source.
        thresholds: the limits.
        extras: outcomes of the gates that were asked for besides.
    """
    left_out = ungated("A", "export", "left out: the samples hold the answers of another student")
    agreement = _absolute_check(against_teacher, coverage, thresholds, who="the artifact")
    return _judgement([left_out, agreement, _coverage_check(coverage, thresholds), *extras])


def conclude(
    verdicts: Mapping[str, Verdict], *, required: Collection[str] = (), failure: Failure | None = None
) -> Conclusion:
    """The verdict over everything that was to be verified.

    A failed gate outranks a failed export, and that a missing requirement; the reasons name all of them.

    Args:
        verdicts: name of the student (``STUDENT``) or artifact file -> its verdict.
        required: names that must have run; NOT RUN or absent is exit code 4.
        failure: error that kept an artifact from being exported.
    """
    failed = sorted(name for name, verdict in verdicts.items() if verdict is Verdict.FAIL)
    absent = sorted(name for name in required if verdicts.get(name, Verdict.NOT_RUN) is Verdict.NOT_RUN)
    ungated = sorted(name for name, verdict in verdicts.items() if verdict is Verdict.NOT_GATED)
    found: list[tuple[Verdict, int, str]] = []
    if failed:
        found.append((Verdict.FAIL, EXIT_GATE_FAILED, f"failed: {', '.join(failed)}"))
    if failure is not None:
        missing = failure.exit_code == EXIT_REQUIREMENT_MISSING
        verdict = Verdict.NOT_RUN if missing else Verdict.FAIL
        found.append((verdict, failure.exit_code, f"not exported: {failure.message}"))
    if absent:
        found.append((Verdict.NOT_RUN, EXIT_REQUIREMENT_MISSING, f"required but NOT RUN: {', '.join(absent)}"))
    if found:
        verdict, exit_code, _ = found[0]
        return Conclusion(verdict, exit_code, tuple(reason for _, _, reason in found), str(verdict))
    artifacts = [verdict for name, verdict in verdicts.items() if name != STUDENT]
    if ungated:
        reason = f"a gate is off or has nothing to judge by for: {', '.join(ungated)}"
        return Conclusion(Verdict.NOT_GATED, EXIT_PASSED, (reason,), _headline(Verdict.NOT_GATED, artifacts))
    if Verdict.PASS in verdicts.values():
        return Conclusion(Verdict.PASS, EXIT_PASSED, headline=_headline(Verdict.PASS, artifacts))
    return Conclusion(Verdict.NOT_RUN, EXIT_PASSED, ("nothing was run",), str(Verdict.NOT_RUN))


def _headline(verdict: Verdict, artifacts: Sequence[Verdict]) -> str:
    """The verdict, and how many of the artifacts it is about where that is not all or there is none."""
    if not artifacts:
        return f"{verdict}: there are no artifacts"
    ran = sum(found is not Verdict.NOT_RUN for found in artifacts)
    return str(verdict) if ran == len(artifacts) else f"{verdict}: {ran} of {len(artifacts)} artifacts ran"


def _export_checks(measured: Measured, precision: str, thresholds: Thresholds) -> list[Check]:
    """Comparison A: the limits of this precision."""
    unusable = _unusable("A", measured, "the artifact or the fp32 student")
    if unusable is not None:
        return [unusable]
    limits = thresholds.export.get(precision, ExportLimits())
    decided = measured.outside_ties
    apart = f" outside {measured.num_left_out:,} ties" if measured.num_left_out else ""
    checks = _tie_findings(measured)
    if limits.max_disagreements is not None:
        found = (
            f"{measured.num_differing} of {measured.n - measured.num_left_out} {measured.unit}{apart} are answered "
            "otherwise than by the fp32 student"
        )
        held = measured.num_differing <= limits.max_disagreements
        checks.append(checked("A", "disagreements", f"{found}, at most {limits.max_disagreements}", held=held))
    if limits.min_agreement is not None:
        claim = "the artifact agrees with the fp32 student"
        checks.append(_bound_check("A", decided, limits.min_agreement, claim, apart=apart))
    if limits.min_sqnr_db is not None:
        found = f"SQNR against the fp32 student is {measured.sqnr_db:.1f} dB"
        held = measured.sqnr_db >= limits.min_sqnr_db
        checks.append(checked("A", "sqnr", f"{found}, at least {limits.min_sqnr_db:g} dB", held=held))
    if limits.max_logit_error is not None:
        found = f"largest logit error is {measured.max_logit_error:.2g} of its sample's logit range"
        held = measured.max_logit_error <= limits.max_logit_error
        checks.append(checked("A", "logit error", f"{found}, at most {limits.max_logit_error:g}", held=held))
    if limits == ExportLimits():
        checks.append(ungated("A", "export", f"no limit is set for precision {precision!r}"))
    return checks


def _tie_findings(measured: Measured) -> list[Check]:
    """A finding where ties are too many to be left out, and some of the answers differ."""
    if not measured.too_many_ties or measured.k == measured.n:
        return []
    share = measured.num_ties / measured.n
    message = (
        f"{measured.num_ties} of {measured.n} {measured.unit} are ties ({share:.1%}): the fp32 student hardly decides "
        "between its two highest classes there; none of them is left out"
    )
    return [ungated("A", "ties", message)]


def _drop_check(artifact: Measured, student: Measured, pairs: Pairs | PairedPixels, thresholds: Thresholds) -> Check:
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


def _student_checks(student: Measured, coverage: Coverage, thresholds: Thresholds) -> list[Check]:
    """The absolute gates of comparisons B and C."""
    return [_absolute_check(student, coverage, thresholds), _coverage_check(coverage, thresholds)]


def _absolute_check(
    student: Measured, coverage: Coverage, thresholds: Thresholds, *, who: str = "the fp32 student"
) -> Check:
    """The student agrees often enough, and more often than one that answers the teacher's commonest class alone."""
    unusable = _unusable("B", student, f"{who} or the teacher", thresholds.source)
    if unusable is not None:
        return unusable
    if thresholds.min_agreement is None:
        return ungated("B", "agreement", "the gate on agreement is switched off")
    claim = f"{who} agrees with the teacher (source {thresholds.source})"
    if coverage.largest_share > thresholds.min_agreement:
        why = ", what one class for all of them would reach"
        return _bound_check("B", student, coverage.largest_share, claim, why=why)
    return _bound_check("B", student, thresholds.min_agreement, claim)


def _coverage_check(coverage: Coverage, thresholds: Thresholds) -> Check:
    if coverage.n == 0:
        return checked("C", "coverage", f"no samples of source {thresholds.source!r} to judge", held=False)
    if thresholds.min_coverage is None:
        return ungated("C", "coverage", "the gate on coverage is switched off")
    message = (
        f"normalised class entropy of the teacher's answers is {coverage.entropy:.3f} "
        f"({coverage.num_empty} of {len(coverage.counts)} classes never seen), at least {thresholds.min_coverage:g}"
    )
    return checked("C", "coverage", message, held=coverage.entropy >= thresholds.min_coverage)


def _unusable(comparison: Comparison, measured: Measured, who: str, source: str | None = None) -> Check | None:
    """A failed check where there is nothing to judge or a logit is not a number."""
    if measured.n == 0:
        where = "" if source is None else f" of source {source!r}"
        return checked(comparison, "samples", f"no samples{where} to judge", held=False)
    if measured.num_nonfinite:
        found = f"{measured.num_nonfinite} of {measured.n} samples have NaN or infinite logits from {who}"
        return checked(comparison, "finite", found, held=False)
    return None


def _bound_check(
    comparison: Comparison,
    measured: Measured | Proportion,
    limit: float,
    claim: str,
    *,
    apart: str = "",
    why: str = "",
) -> Check:
    """The lower bound of a rate against a limit; ``apart`` says which samples are not among those measured."""
    message = (
        f"{claim} on {measured.rate:.2%} [{_told_apart(measured.low, limit)}, {measured.high:.2%}] of {measured.n} "
        f"{measured.unit}{apart}, lower bound at least {limit:.2%}{why}"
    )
    if measured.low_if_perfect < limit:
        message += (
            f" (even {measured.n} of {measured.n} would only show {measured.low_if_perfect:.2%}: take more samples)"
        )
    return checked(comparison, "agreement", message, held=measured.low >= limit)


def _told_apart(bound: float, limit: float) -> str:
    """A percentage with the two decimals or more that show on which side of the limit it lies."""
    digits = next((digits for digits in range(2, 9) if f"{bound:.{digits}%}" != f"{limit:.{digits}%}"), 2)
    return f"{bound:.{digits}%}"


COMPARISON_NAMES: Mapping[Comparison, str] = {
    "A": "A export",
    "B": "B distillation",
    "C": "C coverage",
    "D": "D baseline",
    "E": "E accuracy",
}


def checked(comparison: Comparison, gate: str, message: str, *, held: bool) -> Check:
    """PASS where the gate ``held``, else FAIL; the message begins with the comparison's name."""
    verdict = Verdict.PASS if held else Verdict.FAIL
    return Check(comparison, gate, verdict, f"{COMPARISON_NAMES[comparison]}: {message}")


def ungated(comparison: Comparison, gate: str, message: str) -> Check:
    """The outcome of a gate that is switched off or that nothing could be held against."""
    return Check(comparison, gate, Verdict.NOT_GATED, f"{COMPARISON_NAMES[comparison]}: {message}")


def _judgement(checks: list[Check]) -> Judgement:
    """One FAIL fails; else one NOT GATED leaves the whole NOT GATED."""
    verdicts = {check.verdict for check in checks}
    verdict = next(v for v in (Verdict.FAIL, Verdict.NOT_GATED, Verdict.PASS) if v in verdicts)
    ordered = sorted((check for check in checks if check.verdict is not Verdict.PASS), key=_failed_first)
    return Judgement(verdict, tuple(check.message for check in ordered), tuple(checks))


def _failed_first(check: Check) -> bool:
    return check.verdict is not Verdict.FAIL
