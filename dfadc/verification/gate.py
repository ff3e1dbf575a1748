"""Verdicts: of a network from its gates, and of a whole verification. Standard library only.

A verdict fails closed and never passes what was not judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfadc.verification.checks import Check, Verdict, absolute_checks, drop_check, export_checks

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from dfadc.errors import DfadcError
    from dfadc.verification.coverage import Coverage
    from dfadc.verification.mcnemar import Pairs
    from dfadc.verification.pixel_agreement import Measured
    from dfadc.verification.pixel_scores import PairedPixels
    from dfadc.verification.thresholds import Thresholds

EXIT_PASSED = 0
EXIT_GATE_FAILED = 3
EXIT_REQUIREMENT_MISSING = 4
#: The fp32 student's name among the verdicts.
STUDENT = "student"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, the reasons why it is not PASS, and every check behind it."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The outcome of a whole verification, with the reasons why it is not PASS.

    JSON, JUnit, summary, annotations, verdict line and exit code all state this one. The headline is the verdict, and
    how many of the artifacts ran if not all did.
    """

    verdict: Verdict
    exit_code: int
    reasons: tuple[str, ...] = ()
    headline: str = ""


def judgement_of(checks: Sequence[Check]) -> Judgement:
    """One FAIL fails; else one NOT GATED leaves the whole NOT GATED. Reasons of a FAIL come first."""
    verdicts = {check.verdict for check in checks}
    verdict = next(v for v in (Verdict.FAIL, Verdict.NOT_GATED, Verdict.PASS) if v in verdicts)
    shown = [check for check in checks if check.verdict is not Verdict.PASS]
    shown.sort(key=lambda check: check.verdict is not Verdict.FAIL)
    return Judgement(verdict, tuple(check.message for check in shown), tuple(checks))


def not_run(reason: str) -> Judgement:
    """NOT RUN: the artifact could not run here."""
    return Judgement(Verdict.NOT_RUN, (reason,))


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

    Comparison A is over the samples of all sources; B, of the artifact and of its fp32 student, and C are on the gate's
    source. ``pairs`` hold the student before and the artifact after, ``extras`` the outcomes of further gates.

    Raises:
        ValueError: artifact and student were not compared on the same number of samples.
    """
    return judgement_of(
        [
            *export_checks(against_student, precision, thresholds),
            drop_check(against_teacher, student_against_teacher, pairs, thresholds),
            *absolute_checks(student_against_teacher, coverage, thresholds),
            *extras,
        ]
    )


def conclude(
    verdicts: Mapping[str, Verdict], *, required: Collection[str] = (), failure: DfadcError | None = None
) -> Conclusion:
    """The verdict over everything that was to be verified; ``STUDENT`` or artifact file -> its verdict.

    A failed gate outranks a failed export, and that a missing requirement: one that is NOT RUN or absent. The reasons
    name all of them.
    """
    failed = sorted(name for name, verdict in verdicts.items() if verdict is Verdict.FAIL)
    absent = sorted(name for name in required if verdicts.get(name, Verdict.NOT_RUN) is Verdict.NOT_RUN)
    not_gated = sorted(name for name, verdict in verdicts.items() if verdict is Verdict.NOT_GATED)
    problems: list[tuple[Verdict, int, str]] = []
    if failed:
        problems.append((Verdict.FAIL, EXIT_GATE_FAILED, f"failed: {', '.join(failed)}"))
    if failure is not None:
        missing = failure.exit_code == EXIT_REQUIREMENT_MISSING
        verdict = Verdict.NOT_RUN if missing else Verdict.FAIL
        problems.append((verdict, failure.exit_code, f"not exported: {failure.message}"))
    if absent:
        problems.append((Verdict.NOT_RUN, EXIT_REQUIREMENT_MISSING, f"required but NOT RUN: {', '.join(absent)}"))
    if problems:
        verdict, exit_code, _ = problems[0]
        return Conclusion(verdict, exit_code, tuple(reason for _, _, reason in problems), str(verdict))
    artifacts = [verdict for name, verdict in verdicts.items() if name != STUDENT]
    if not_gated:
        reason = f"a gate is off or has nothing to compare with, for: {', '.join(not_gated)}"
        return Conclusion(Verdict.NOT_GATED, EXIT_PASSED, (reason,), _headline(Verdict.NOT_GATED, artifacts))
    if Verdict.PASS in verdicts.values():
        return Conclusion(Verdict.PASS, EXIT_PASSED, headline=_headline(Verdict.PASS, artifacts))
    return Conclusion(Verdict.NOT_RUN, EXIT_PASSED, ("nothing was run",), str(Verdict.NOT_RUN))


def _headline(verdict: Verdict, artifacts: Sequence[Verdict]) -> str:
    """The verdict, and how many of the artifacts it is about if that is not all or there is none."""
    if not artifacts:
        return f"{verdict}: there are no artifacts"
    num_ran = sum(entry is not Verdict.NOT_RUN for entry in artifacts)
    return str(verdict) if num_ran == len(artifacts) else f"{verdict}: {num_ran} of {len(artifacts)} artifacts ran"
