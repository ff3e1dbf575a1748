"""Several labels an image: agreement, coverage, gates and accuracy, against independent formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_material import make_samples

from dfadc.contract import ImageContract
from dfadc.verification.agreement import of_samples, predict
from dfadc.verification.baseline import Baseline
from dfadc.verification.checks import Verdict
from dfadc.verification.coverage import measure_label_coverage
from dfadc.verification.judge import ArtifactFile, verify_artifact, verify_student
from dfadc.verification.label_agreement import LabelAccuracy, compare_labels
from dfadc.verification.rates import TIE_MARGIN, wilson_interval
from dfadc.verification.regression import GATED, compare_with_baseline
from dfadc.verification.thresholds import ExportLimits, Thresholds

if TYPE_CHECKING:
    from dfadc.verification.samples import SampleSet

Logits = npt.NDArray[np.float32]

THRESHOLDS = Thresholds(source="prior", min_agreement=0.0, min_coverage=0.5, min_class_agreement=0.7)


def random_logits(seed: int, n: int = 200, num_labels: int = 5) -> Logits:
    return np.random.default_rng(seed).normal(scale=4.0, size=(n, num_labels)).astype(np.float32)


def label_samples(teacher: Logits, student: Logits) -> SampleSet:
    """Samples of the prior alone with these logits."""
    samples = make_samples(num_classes=teacher.shape[1], counts=(0, 0, len(teacher), 0), names=None)
    contract = ImageContract((1, 8, 8), teacher.shape[1], mean=(0.5,), std=(0.25,), task="multilabel")
    return replace(samples, teacher_logits=teacher, student_logits=student, contract=contract)


def checks_of(teacher: Logits, student: Logits, thresholds: Thresholds = THRESHOLDS) -> dict[str, Any]:
    return {check.gate: check for check in verify_student(label_samples(teacher, student), thresholds).judgement.checks}


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), num_labels=st.integers(2, 12))
def test_a_sample_agrees_where_every_label_does(seed: int, n: int, num_labels: int) -> None:
    candidate, reference = random_logits(seed, n, num_labels), random_logits(seed + 1, n, num_labels)
    candidate[: n // 2] = reference[: n // 2]
    found = compare_labels(candidate, reference)
    same = [
        {*np.flatnonzero(one > 0)} == {*np.flatnonzero(other > 0)}
        for one, other in zip(candidate, reference, strict=True)
    ]
    assert (found.n, found.k) == (n, sum(same))
    for label in range(num_labels):
        for is_on in (False, True):
            entry = found.per_class[2 * label + is_on]
            chosen = (reference[:, label] > 0) == is_on
            right = chosen & ((candidate[:, label] > 0) == is_on)
            assert (entry.index, entry.n, entry.k) == (2 * label + is_on, chosen.sum(), right.sum())
            assert entry.name == f"label {label} {'on' if is_on else 'off'}"


@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_labels_does_not_matter_to_the_totals(seed: int) -> None:
    candidate, reference = random_logits(seed), random_logits(seed + 1)
    order = np.random.default_rng(seed).permutation(reference.shape[1])
    plain, shuffled = compare_labels(candidate, reference), compare_labels(candidate[:, order], reference[:, order])
    assert (shuffled.k, shuffled.num_ties, shuffled.sqnr_db) == pytest.approx((plain.k, plain.num_ties, plain.sqnr_db))


def test_kl_is_the_sum_of_the_labels() -> None:
    candidate, reference = random_logits(0).astype(np.float64), random_logits(1).astype(np.float64)
    p, q = (1 / (1 + np.exp(-logits)) for logits in (reference, candidate))
    of_each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert compare_labels(candidate, reference).kl == pytest.approx(of_each.sum(axis=1).mean(), rel=1e-6)


def test_a_tied_label_is_left_out_and_the_others_count() -> None:
    reference = np.full((100, 4), 5.0)
    reference[:, 1] = -5.0
    reference[:4, 0] = TIE_MARGIN * 10 * 0.4
    candidate = reference.copy()
    candidate[0, 0] = -1e-3  # a tie that falls the other way
    candidate[1, :2] = -1e-3, 1e-3  # a tie, and a label that is none
    candidate[50, 2] = -5.0
    found = compare_labels(candidate, reference)
    assert (found.k, found.num_ties, found.num_tied_disagreements) == (97, 4, 1)
    assert (found.num_differing, found.num_compared) == (2, 100)
    assert (found.outside_ties.n, found.outside_ties.k) == (100, 98)
    assert not found.too_many_ties
    for count, is_too_many in ((20, False), (21, True)):
        reference[:count, 0] = TIE_MARGIN * 10 * 0.4
        assert compare_labels(candidate, reference).too_many_ties is is_too_many, f"{count} of 400 labels"


def test_the_scale_includes_the_threshold() -> None:
    """Labels that are all off, and equally so, have no range of their own."""
    reference = np.full((10, 3), -8.0)
    found = compare_labels(reference + 0.08, reference)
    assert found.max_logit_error == pytest.approx(0.01)
    assert found.sqnr_db == pytest.approx(40)


def test_logits_that_are_not_finite_never_agree() -> None:
    reference, candidate = random_logits(0), random_logits(0)
    candidate[0, 0], reference[1, 0] = np.nan, np.inf
    found = compare_labels(candidate, reference)
    assert (found.k, found.num_nonfinite) == (198, 2)
    assert (predict(candidate, "multilabel")[0] == -1).all()
    assert checks_of(reference, candidate)["finite"].verdict is Verdict.FAIL


def test_coverage_is_of_sets_and_counts_every_state() -> None:
    labels = np.array([[1, 0], [1, 0], [0, 1], [1, 1], [-1, -1]])
    found = measure_label_coverage(labels)
    assert (found.n, found.num_nonfinite, found.counts, found.num_empty) == (4, 1, (1, 3, 2, 2), 0)
    shares = np.array([0.5, 0.25, 0.25])
    assert found.entropy == pytest.approx(-(shares * np.log(shares)).sum() / math.log(4))
    assert found.largest_share == 0.5
    assert measure_label_coverage(labels[:0]).n == 0


def test_a_label_that_is_never_on_fails_coverage() -> None:
    logits = random_logits(0, n=400)
    assert checks_of(logits, logits)["coverage"].verdict is Verdict.PASS
    logits[:, 3] = -4.0
    check = checks_of(logits, logits)["coverage"]
    assert check.verdict is Verdict.FAIL
    assert "1 of 10 states of labels never seen, and each must be" in check.message


def test_a_student_without_one_label_fails_though_it_has_most_labels_right() -> None:
    """Off in nine of ten samples: a student that never gives it has 90 % of that label right."""
    teacher = random_logits(0, n=1000)
    teacher[:, 2] -= 4 * 1.2816
    student = teacher.copy()
    student[:, 2] = -1.0
    found = checks_of(teacher, student)
    assert found["agreement"].verdict is Verdict.PASS, "most samples have every label right"
    assert found["class agreement"].verdict is Verdict.FAIL
    assert "least in label 2 on, on 0.00%" in found["class agreement"].message
    assert checks_of(teacher, teacher)["class agreement"].verdict is Verdict.PASS


def test_one_set_of_labels_for_all_samples_is_no_agreement() -> None:
    teacher = random_logits(0, n=600) - 6  # mostly no label at all
    student = np.full_like(teacher, -1)
    check = checks_of(teacher, student)["agreement"]
    assert check.verdict is Verdict.FAIL
    assert "which one set of labels for all of them would reach" in check.message


@pytest.mark.parametrize("num_labels", [5, 80])
def test_a_half_precision_copy_passes_with_any_number_of_labels(num_labels: int) -> None:
    student = random_logits(3, n=2048, num_labels=num_labels)
    samples = label_samples(student, student)
    thresholds = replace(THRESHOLDS, export={"fp16": ExportLimits(min_agreement=0.995, min_sqnr_db=40.0)})
    rounded = student.astype(np.float16).astype(np.float32)
    result = verify_artifact(ArtifactFile("a.onnx", "fp16"), rounded, samples=samples, thresholds=thresholds)
    assert result.judgement.verdict is Verdict.PASS, result.judgement.reasons
    flipped = rounded * np.where(np.random.default_rng(0).random(rounded.shape) < 0.01, -1, 1).astype(np.float32)
    result = verify_artifact(ArtifactFile("a.onnx", "fp16"), flipped, samples=samples, thresholds=thresholds)
    assert result.judgement.verdict is Verdict.FAIL


def test_a_baseline_pairs_whole_samples() -> None:
    teacher = random_logits(0, n=400)
    before, after = teacher.copy(), teacher.copy()
    before[:10, 0] *= -1
    after[5:40, :3] *= -1
    samples = label_samples(teacher, before)
    baseline = Baseline("run", "ab", samples, {"student": samples.predict(before)})
    compared = compare_with_baseline(baseline, "student", classes=samples.predict(after), correct=None)
    assert compared is not None
    pairs = compared.agreement[GATED]
    assert (pairs.n, pairs.lost, pairs.gained) == (400, 30, 5)


def test_a_baseline_keeps_the_labels(tmp_path: Any) -> None:
    teacher = random_logits(0, n=50)
    samples = label_samples(teacher, teacher)
    Baseline("run", "ab", samples, {"student": samples.predict(teacher)}).save(tmp_path / "b.npz")
    loaded = Baseline.load(tmp_path / "b.npz")
    assert loaded.samples.contract.task == "multilabel"
    np.testing.assert_array_equal(loaded.predictions["student"], teacher > 0)


def test_accuracy_is_of_whole_images_and_of_each_label() -> None:
    correct = np.ones((10, 3), np.bool_)
    correct[:2, 0] = correct[1, 2] = False
    found = LabelAccuracy.of(correct)
    assert (found.n, found.k, found.unit) == (10, 8, "labelled images")
    labels = found.labels_dict()
    assert labels["mean"] == pytest.approx(27 / 30)
    assert [entry["k"] for entry in labels["per_label"]] == [8, 10, 9]
    assert (labels["per_label"][2]["low"], labels["per_label"][2]["high"]) == wilson_interval(9, 10)
    np.testing.assert_array_equal(of_samples(correct), correct.all(axis=1))
