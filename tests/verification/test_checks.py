"""The gates that are judged where they are asked for: each is shown to be silent, to pass and to fail."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dfadc.verification.agreement import Agreement, ClassAgreement
from dfadc.verification.checks import Check, Verdict, optional_checks
from dfadc.verification.rates import Accuracy
from dfadc.verification.thresholds import Thresholds

OFF = Thresholds(source="generator", min_agreement=0.5, min_coverage=0.5)
#: Rates of 95 %, 80 % and 100 %, the last of too few samples; the lower bounds are 88.8 % and 71.1 %.
PER_CLASS = (ClassAgreement(100, 95, 0), ClassAgreement(100, 80, 1), ClassAgreement(10, 10, 2))
MEASURED = Agreement(210, 185, 0, 0.99, 0.1, 15.0, 0.1, PER_CLASS, 0)


def by_class(limit: float, *classes: ClassAgreement) -> Check:
    measured = replace(MEASURED, per_class=classes or PER_CLASS)
    (check,) = optional_checks("the artifact", measured, None, replace(OFF, min_class_agreement=limit))
    return check


def test_nothing_is_said_of_gates_that_are_off() -> None:
    assert optional_checks("the artifact", MEASURED, Accuracy(100, 1), OFF) == []


@pytest.mark.parametrize(("limit", "verdict"), [(0.71, Verdict.PASS), (0.72, Verdict.FAIL), (0.79, Verdict.FAIL)])
def test_each_class_is_judged_by_its_lower_bound(limit: float, verdict: Verdict) -> None:
    check = by_class(limit)
    assert (check.comparison, check.gate, check.verdict) == ("B", "class agreement", verdict)
    assert "the artifact agrees with the teacher least in class 1, on 80.00% [71.1" in check.message
    assert ("1 classes fall below it: 1" in check.message) == (verdict is Verdict.FAIL)


def test_a_class_with_too_few_samples_is_not_judged_and_that_is_said() -> None:
    hopeless = ClassAgreement(29, 0, 2)
    check = by_class(0.7, *PER_CLASS[:2], hopeless)
    assert check.verdict is Verdict.PASS
    assert "1 of 3 classes have too few samples: 2" in check.message
    assert by_class(0.7, *PER_CLASS[:2], replace(hopeless, n=30)).verdict is Verdict.FAIL


def test_too_few_samples_in_every_class_fail() -> None:
    check = by_class(0.1, *(ClassAgreement(29, 29, index) for index in range(8)))
    assert check.verdict is Verdict.FAIL
    assert "none of the classes has enough samples" in check.message
    assert "0, 1, 2, 3, 4 and 3 more" in check.message


def test_many_classes_that_fall_below_are_counted() -> None:
    check = by_class(0.9, *(ClassAgreement(100, 50, index) for index in range(7)))
    assert "7 classes fall below it: 0, 1, 2, 3, 4 and 2 more" in check.message


@pytest.mark.parametrize(("k", "verdict"), [(920, Verdict.PASS), (918, Verdict.FAIL), (900, Verdict.FAIL)])
def test_accuracy_is_judged_by_its_lower_bound(k: int, verdict: Verdict) -> None:
    (check,) = optional_checks("the student", MEASURED, Accuracy(1000, k), replace(OFF, min_accuracy=0.9))
    assert (check.comparison, check.gate, check.verdict) == ("E", "accuracy", verdict)
    assert f"E accuracy: the student classifies {k / 1000:.2%}" in check.message


def test_a_gate_on_accuracy_without_labels_is_not_gated() -> None:
    (check,) = optional_checks("the student", MEASURED, None, replace(OFF, min_accuracy=0.9))
    assert check.verdict is Verdict.NOT_GATED


@pytest.mark.parametrize("gate", ["min_class_agreement", "min_accuracy"])
def test_a_limit_that_is_nan_fails_closed(gate: str) -> None:
    limits: dict[str, Any] = {gate: math.nan}
    (check,) = optional_checks("the student", MEASURED, Accuracy(100, 100), replace(OFF, **limits))
    assert check.verdict is Verdict.FAIL


def test_no_samples_are_left_to_the_gates_that_are_always_on() -> None:
    nothing = replace(MEASURED, n=0, k=0, per_class=())
    assert optional_checks("the student", nothing, None, replace(OFF, min_class_agreement=0.5)) == []
