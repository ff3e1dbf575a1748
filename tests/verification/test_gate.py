"""Every gate is shown to pass, to fail and to be switched off."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dfadc.errors import ExportFailed, RequirementMissing, StorageFailed
from dfadc.verification.agreement import Agreement
from dfadc.verification.checks import Verdict, absolute_checks
from dfadc.verification.coverage import Coverage
from dfadc.verification.gate import Judgement, conclude, judge_artifact, judgement_of, not_run
from dfadc.verification.mcnemar import Pairs
from dfadc.verification.thresholds import ExportLimits, Thresholds

PASS, FAIL, NOT_RUN, NOT_GATED = Verdict.PASS, Verdict.FAIL, Verdict.NOT_RUN, Verdict.NOT_GATED
EXACT = Agreement(2048, 2048, 0, 1.0, 0.0, math.inf, 0.0, (), 0)
#: A student that agrees with its teacher on 95 %: the lower bound is 93.97 %.
STUDENT = Agreement(2000, 1900, 0, 0.99, 0.1, 15.0, 0.1, (), 0)
EVEN = Coverage((200,) * 10, 0)
THRESHOLDS = Thresholds(source="generator", min_agreement=0.9, min_coverage=0.7)


def judge(
    export: Agreement = EXACT,
    *,
    precision: str = "fp32",
    artifact: Agreement = STUDENT,
    student: Agreement = STUDENT,
    pairs: Pairs | None = None,
    coverage: Coverage = EVEN,
    thresholds: Thresholds = THRESHOLDS,
) -> Judgement:
    return judge_artifact(
        precision=precision,
        against_student=export,
        against_teacher=artifact,
        student_against_teacher=student,
        pairs=pairs or paired_at_best(student, artifact),
        coverage=coverage,
        thresholds=thresholds,
    )


def paired_at_best(student: Agreement, artifact: Agreement) -> Pairs:
    """The fewest samples that change sides between these two numbers of right answers."""
    both = min(student.k, artifact.k)
    return Pairs(student.n, both, lost=student.k - both, gained=artifact.k - both)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_exact_copy_of_a_good_student_passes(precision: str) -> None:
    judgement = judge(precision=precision)
    assert (judgement.verdict, judgement.reasons) == (PASS, ())
    assert {check.comparison for check in judgement.checks} == {"A", "B", "C"}


@pytest.mark.parametrize(
    ("precision", "changes", "verdict", "reason"),
    [
        ("fp32", {"k": 2047}, FAIL, "the predictions of 1 of 2048 samples differ"),
        ("fp32", {"k": 2047, "num_ties": 1, "num_tied_disagreements": 1}, PASS, ""),
        ("fp32", {"k": 2047, "num_ties": 1}, FAIL, "the predictions of 1 of 2047 samples outside 1 ties differ"),
        ("fp32", {"max_logit_error": 0.9e-4}, PASS, ""),
        ("fp32", {"max_logit_error": 1.1e-4}, FAIL, "largest logit error"),
        ("fp32", {"max_logit_error": math.nan}, FAIL, "largest logit error"),
        ("fp16", {"k": 2045}, PASS, ""),
        ("fp16", {"k": 2044}, FAIL, "[99.499%, 99.92%] of 2048 samples, lower bound at least 99.50%"),
        ("fp16", {"k": 2044, "num_ties": 1, "num_tied_disagreements": 1}, PASS, ""),
        (
            "fp16",
            {"k": 2038, "num_ties": 6, "num_tied_disagreements": 5},
            FAIL,
            "of 2042 samples outside 6 ties, lower bound",
        ),
        ("fp16", {"sqnr_db": 40.0}, PASS, ""),
        ("fp16", {"sqnr_db": 39.9}, FAIL, "SQNR"),
        ("int8", {"k": 2010}, PASS, ""),
        ("int8", {"k": 1990}, FAIL, "lower bound at least 97.00%"),
        ("int8", {"sqnr_db": 20.0}, PASS, ""),
        ("int8", {"sqnr_db": 19.9}, FAIL, "SQNR"),
        ("int8", {"sqnr_db": math.nan}, FAIL, "SQNR"),
        ("int8", {"num_nonfinite": 1}, FAIL, "NaN or infinite logits from the artifact"),
        ("int8", {"n": 0, "k": 0}, FAIL, "A export: no samples to judge"),
    ],
)
def test_comparison_a(precision: str, changes: dict[str, Any], verdict: Verdict, reason: str) -> None:
    judgement = judge(replace(EXACT, **changes), precision=precision)
    assert judgement.verdict is verdict
    assert len(judgement.reasons) == (verdict is FAIL)
    assert all(why.startswith("A export") and reason in why for why in judgement.reasons)


def test_ties_that_are_too_many_are_a_finding_and_hide_no_disagreement() -> None:
    undecided = replace(EXACT, num_ties=103)
    assert judge(undecided, precision="fp16").verdict is PASS
    one = replace(undecided, k=2047, num_tied_disagreements=1)
    judgement = judge(one, precision="fp16")
    assert judgement.verdict is NOT_GATED
    assert "103 of 2048 samples are ties (5.0%)" in judgement.reasons[0]
    many = replace(undecided, k=1990, num_tied_disagreements=58)
    assert judge(many, precision="fp16").verdict is FAIL


def test_too_few_samples_to_show_the_bound_says_so() -> None:
    few = replace(EXACT, n=700, k=700)
    judgement = judge(few, precision="fp16")
    assert judgement.verdict is FAIL
    assert "even 700 of 700 would only show 99.45%: take more samples" in judgement.reasons[0]


def test_a_precision_without_limits_is_not_gated() -> None:
    judgement = judge(precision="bf16")
    assert judgement.verdict is NOT_GATED
    assert judgement.reasons == ("A export: no limit is set for precision 'bf16'",)
    own = replace(THRESHOLDS, export={"bf16": ExportLimits(min_agreement=0.9)})
    assert judge(precision="bf16", thresholds=own).verdict is PASS


@pytest.mark.parametrize(("k", "verdict"), [(1880, PASS), (1879, FAIL), (1920, PASS)])
def test_comparison_b_allows_one_point_under_the_student(k: int, verdict: Verdict) -> None:
    judgement = judge(artifact=replace(STUDENT, k=k))
    assert judgement.verdict is verdict
    if verdict is FAIL:
        assert "+1.05 points under it; 21 lost and 0 gained of 2000" in judgement.reasons[0]
        assert "fails if more than 1 points are lost and p < 0.05" in judgement.reasons[0]


@pytest.mark.parametrize(
    ("pairs", "limit", "verdict"),
    [
        (Pairs(42, 40, lost=1, gained=0), 0.01, PASS),  # 2.4 points, one sample
        (Pairs(42, 40, lost=2, gained=1), 0.0, PASS),
        (Pairs(42, 37, lost=5, gained=0), 0.01, FAIL),
        (Pairs(2000, 1800, lost=80, gained=50), 0.01, FAIL),  # 1.5 points, p = .005
        (Pairs(2000, 1700, lost=180, gained=157), 0.01, PASS),  # 1.15 points, p = .11
        (Pairs(2000, 1400, lost=100, gained=0), 0.01, FAIL),  # 5 % of its answers
        (Pairs(2000, 1900, lost=19, gained=0), 0.01, PASS),  # significant, and within the limit
        (Pairs(1000, 4, lost=0, gained=900), 0.01, FAIL),  # nothing could be lost
    ],
)
def test_a_drop_under_the_student_fails_where_it_is_no_chance(pairs: Pairs, limit: float, verdict: Verdict) -> None:
    student, artifact = (replace(STUDENT, n=pairs.n, k=pairs.both + more) for more in (pairs.lost, pairs.gained))
    thresholds = replace(THRESHOLDS, max_student_drop=limit, min_agreement=None)
    judgement = judge(student=student, artifact=artifact, pairs=pairs, thresholds=thresholds)
    (drop,) = (check for check in judgement.checks if check.gate == "drop")
    assert drop.verdict is verdict, drop.message
    if pairs.n == 42:
        assert "(42 pairs cannot show a drop of less than 11.9 points)" in drop.message


def test_comparison_b_is_paired() -> None:
    with pytest.raises(ValueError, match="not paired"):
        judge(artifact=replace(STUDENT, n=1999))


def test_an_exact_copy_of_a_student_that_fell_short_fails() -> None:
    short = replace(STUDENT, k=1820)  # 91.0 %, and the lower bound is 89.7 %
    judgement = judge(artifact=short, student=short)
    assert judgement.verdict is FAIL
    assert (
        "B distillation: the fp32 student agrees with the teacher (source generator) on 91.00%" in judgement.reasons[0]
    )


@pytest.mark.parametrize(("k", "verdict"), [(1900, PASS), (1830, PASS), (1820, FAIL)])
def test_the_student_is_judged_by_its_lower_bound(k: int, verdict: Verdict) -> None:
    judgement = judgement_of(absolute_checks(replace(STUDENT, k=k), EVEN, THRESHOLDS))
    assert judgement.verdict is verdict


def test_a_student_that_answers_nan_fails() -> None:
    broken = replace(STUDENT, num_nonfinite=3)
    judgement = judgement_of(absolute_checks(broken, EVEN, THRESHOLDS))
    assert judgement.verdict is FAIL
    assert "3 of 2000 samples have NaN or infinite logits" in judgement.reasons[0]


@pytest.mark.parametrize(
    ("counts", "verdict"), [((400,) * 5 + (0,) * 5, FAIL), ((300,) * 6 + (0,) * 4, PASS), ((1500,) + (50,) * 9, FAIL)]
)
def test_comparison_c(counts: tuple[int, ...], verdict: Verdict) -> None:
    judgement = judge(coverage=Coverage(counts, 0))
    assert judgement.verdict is verdict
    assert all(why.startswith("C coverage: normalised class entropy") for why in judgement.reasons)


def test_a_student_that_answers_one_class_alone_fails_however_low_the_bar() -> None:
    """It agrees as often as the teacher answers that class; one that agrees more often knows another, too."""
    low = replace(THRESHOLDS, min_agreement=0.5, min_coverage=0.3)
    coverage = Coverage((1200, *(100,) * 8, 0), 0)
    for k, verdict in ((1200, FAIL), (1243, PASS)):
        judgement = judgement_of(absolute_checks(replace(STUDENT, k=k), coverage, low))
        assert judgement.verdict is verdict, judgement.reasons
        assert all("at least 60.00%, which one class for all of them would reach" in why for why in judgement.reasons)


def test_no_samples_of_the_gates_source_fails() -> None:
    nothing = replace(STUDENT, n=0, k=0)
    judgement = judge(artifact=nothing, student=nothing, coverage=Coverage((0,) * 10, 0))
    assert judgement.verdict is FAIL
    assert all("no samples of source 'generator' to judge" in why for why in judgement.reasons)
    off = Thresholds(min_agreement=None, min_coverage=None, max_student_drop=None)
    student = judgement_of(absolute_checks(nothing, Coverage((0,) * 10, 0), off))
    assert student.verdict is FAIL


@pytest.mark.parametrize("gate", ["min_agreement", "min_coverage", "max_student_drop"])
def test_a_gate_switched_off_reads_not_gated_and_hides_no_failure(gate: str) -> None:
    switched_off: dict[str, Any] = {gate: None}
    off = replace(THRESHOLDS, **switched_off)
    judgement = judge(thresholds=off)
    assert judgement.verdict is NOT_GATED
    assert "switched off" in judgement.reasons[0]
    failing = judge(replace(EXACT, k=2047), thresholds=off)
    assert failing.verdict is FAIL
    assert "differ from the fp32 student" in failing.reasons[0]
    assert "switched off" in failing.reasons[1]


@pytest.mark.parametrize("gate", ["min_agreement", "min_coverage", "max_student_drop"])
def test_a_limit_that_is_nan_fails_closed(gate: str) -> None:
    no_number: dict[str, Any] = {gate: math.nan}
    assert judge(thresholds=replace(THRESHOLDS, **no_number)).verdict is FAIL


def test_not_run_carries_its_reason() -> None:
    assert not_run("no GPU") == Judgement(NOT_RUN, ("no GPU",))


@pytest.mark.parametrize(
    ("verdicts", "required", "verdict", "exit_code"),
    [
        ({"student": PASS, "a": PASS}, (), PASS, 0),
        ({"student": PASS, "a": NOT_RUN}, (), PASS, 0),
        ({"student": PASS, "a": NOT_RUN}, ("a",), NOT_RUN, 4),
        ({"student": PASS}, ("a",), NOT_RUN, 4),
        ({"student": PASS, "a": FAIL}, (), FAIL, 3),
        ({"student": FAIL, "a": NOT_RUN}, ("a",), FAIL, 3),
        ({"student": NOT_GATED, "a": PASS}, ("a",), NOT_GATED, 0),
        ({"student": NOT_GATED, "a": NOT_RUN}, ("a",), NOT_RUN, 4),
        ({"a": NOT_RUN}, (), NOT_RUN, 0),
        ({}, (), NOT_RUN, 0),
    ],
)
def test_conclusion(verdicts: dict[str, Verdict], required: tuple[str, ...], verdict: Verdict, exit_code: int) -> None:
    conclusion = conclude(verdicts, required=required)
    assert (conclusion.verdict, conclusion.exit_code) == (verdict, exit_code)
    assert bool(conclusion.reasons) == (verdict is not PASS)
    assert conclusion.headline.startswith(verdict)


@pytest.mark.parametrize(
    ("failure_code", "verdicts", "required", "verdict", "exit_code", "num_reasons"),
    [
        (5, {"student": PASS, "a": PASS}, (), FAIL, 5, 1),
        (4, {"student": PASS, "a": PASS}, (), NOT_RUN, 4, 1),
        (7, {"student": NOT_GATED}, (), FAIL, 7, 1),
        (5, {"student": PASS}, ("b",), FAIL, 5, 2),
        (5, {"student": FAIL}, ("b",), FAIL, 3, 3),
    ],
)
def test_a_failed_export_is_no_pass_and_every_reason_is_named(
    failure_code: int,
    verdicts: dict[str, Verdict],
    required: tuple[str, ...],
    verdict: Verdict,
    exit_code: int,
    num_reasons: int,
) -> None:
    kind = {4: RequirementMissing, 5: ExportFailed, 7: StorageFailed}[failure_code]
    failure = kind("torch cannot export it", "use another layer")
    conclusion = conclude(verdicts, required=required, failure=failure)
    assert (conclusion.verdict, conclusion.exit_code, conclusion.headline) == (verdict, exit_code, verdict)
    assert "not exported: torch cannot export it" in conclusion.reasons
    assert len(conclusion.reasons) == num_reasons


@pytest.mark.parametrize(
    ("artifacts", "headline"),
    [
        ([PASS, PASS], "PASS"),
        ([PASS, NOT_RUN], "PASS: 1 of 2 artifacts ran"),
        ([NOT_RUN], "PASS: 0 of 1 artifacts ran"),
        ([], "PASS: there are no artifacts"),
        ([NOT_GATED, NOT_RUN], "NOT GATED: 1 of 2 artifacts ran"),
        ([FAIL, NOT_RUN], "FAIL"),
    ],
)
def test_a_pass_says_how_many_artifacts_ran(artifacts: list[Verdict], headline: str) -> None:
    verdicts = {"student": PASS, **{f"{index}.onnx": verdict for index, verdict in enumerate(artifacts)}}
    assert conclude(verdicts).headline == headline
