"""A baseline's file, what it refuses, and comparison D: networks beside themselves, in pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError, GateFailed, RequirementMissing, StorageFailed
from dfadc.verification.agreement import predict
from dfadc.verification.baseline import Baseline, LabelledResults
from dfadc.verification.checks import Verdict
from dfadc.verification.regression import (
    GATED,
    baseline_checks,
    compare_with_baseline,
    describe_baseline,
    unseen_drops,
)
from dfadc.verification.samples import SampleSet

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CONTRACT = ImageContract((1, 4, 4), 5, mean=(0.5,), std=(0.5,), class_names=("a", "b", "c", "d", "e"))
N, NUM_LABELLED = 1000, 400
TEACHER = "ab" * 32
NAME = "student.int8.onnx"


def answers(classes: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.eye(5, dtype=np.float32)[classes]


def wrong(classes: NDArray[Any], indices: slice) -> NDArray[np.int32]:
    """The classes, others at these indices."""
    changed = classes.astype(np.int32)
    changed[indices] = (changed[indices] + 1) % 5
    return changed


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    """The student is right on 900 of 1,000 samples, the artifact on 890; of 400 labelled images on 360 both."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 5, N)
    samples = SampleSet(
        images=rng.integers(0, 256, (N, 1, 4, 4), dtype=np.uint8),
        source=np.repeat(np.array([0, 1, 2, 3], np.int8), [800, 100, 60, 40]),
        sources=("prior", "generator", "snapshots", "adversary"),
        teacher_logits=answers(classes),
        student_logits=answers(wrong(classes, slice(100)).astype(np.int64)),
        contract=CONTRACT,
    )
    predictions = {"student": wrong(classes, slice(100)), NAME: wrong(classes, slice(110))}
    correct = np.arange(NUM_LABELLED) >= 40
    return Baseline(
        "first", TEACHER, samples, predictions, LabelledResults("cd" * 32, dict.fromkeys(predictions, correct))
    )


def changed_file(path: Path, *, arrays: dict[str, Any] | None = None, **metadata: Any) -> Path:
    """A baseline's file with other arrays or metadata."""
    with np.load(path) as archive:
        content = dict(archive)
    content |= arrays or {}
    content["metadata"] = np.array(json.dumps({**json.loads(str(content["metadata"])), **metadata}))
    target = path.with_name("changed.npz")
    np.savez(target, **content)
    return target


@pytest.fixture
def file(baseline: Baseline, tmp_path: Path) -> Path:
    baseline.save(tmp_path / "baseline.npz")
    return tmp_path / "baseline.npz"


def test_a_file_gives_the_baseline_back(baseline: Baseline, file: Path) -> None:
    read = Baseline.load(file)
    assert (read.run, read.teacher_sha256, list(read.predictions)) == ("first", TEACHER, ["student", NAME])
    assert read.samples.sha256 == baseline.samples.sha256
    for name, classes in baseline.predictions.items():
        np.testing.assert_array_equal(read.predictions[name], classes)
    assert read.labelled is not None
    assert read.labelled.n == NUM_LABELLED
    read.save(file.with_name("again.npz"))
    assert file.with_name("again.npz").read_bytes() == file.read_bytes()


def test_a_baseline_without_labels_too(baseline: Baseline, tmp_path: Path) -> None:
    replace(baseline, labelled=None).save(tmp_path / "baseline.npz")
    assert Baseline.load(tmp_path / "baseline.npz").labelled is None


def test_a_missing_baseline_is_a_missing_requirement(tmp_path: Path) -> None:
    with pytest.raises(RequirementMissing, match="no baseline") as caught:
        Baseline.load(tmp_path / "nowhere.npz")
    assert caught.value.exit_code == 4


def test_other_schemas_and_damage_are_named(baseline: Baseline, file: Path) -> None:
    with pytest.raises(DfadcError, match=r"schema 'dfadc.baseline/99', this version reads 'dfadc.baseline/1'"):
        Baseline.load(changed_file(file, schema="dfadc.baseline/99"))
    baseline.samples.save(file.with_name("samples.npz"))
    with pytest.raises(DfadcError, match=r"schema 'dfadc.samples/1'.* in a baseline") as caught:
        Baseline.load(file.with_name("samples.npz"))
    assert caught.value.exit_code == 2
    with pytest.raises(DfadcError, match=r"schema 'dfadc.baseline/1'.* in a sample file"):
        SampleSet.load(file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DfadcError, match="cannot be read as a baseline"):
        Baseline.load(file)


def test_samples_that_were_changed_are_refused(baseline: Baseline, file: Path) -> None:
    images = baseline.samples.images.copy()
    images[0, 0, 0, 0] ^= 1
    with pytest.raises(DfadcError, match="was frozen with") as caught:
        Baseline.load(changed_file(file, arrays={"images": images}))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("arrays", "metadata"),
    [
        ({"predictions": np.zeros((2, 7), np.int32)}, {}),
        ({"predictions": np.zeros((2, N), np.float32)}, {}),
        ({"predictions": np.full((2, N), 5, np.int32)}, {}),
        ({"predictions": np.zeros((1, N), np.int32)}, {}),
        ({"correct": np.zeros((2, 0), np.bool_)}, {}),
        ({"correct": np.zeros((2, 9), np.int64)}, {}),
        ({}, {"networks": ["student"]}),
        ({}, {"networks": None}),
        ({}, {"samples": None}),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    arrays: dict[str, Any], metadata: dict[str, Any], file: Path
) -> None:
    with pytest.raises(DfadcError, match=r"baseline|metadata") as caught:
        Baseline.load(changed_file(file, arrays=arrays, **metadata))
    assert caught.value.exit_code == 2


def test_nothing_to_compare_with_is_a_failed_gate(baseline: Baseline) -> None:
    samples = baseline.samples
    empty = replace(
        samples,
        images=samples.images[:0],
        source=samples.source[:0],
        teacher_logits=samples.teacher_logits[:0],
        student_logits=samples.student_logits[:0],
    )
    with pytest.raises(GateFailed, match="no samples") as caught:
        replace(baseline, samples=empty)
    assert caught.value.exit_code == 3
    broken = samples.teacher_logits.copy()
    broken[3] = np.nan
    with pytest.raises(GateFailed, match="the teacher has NaN or infinite logits for 1 of 1000 samples"):
        replace(baseline, samples=replace(samples, teacher_logits=broken))
    with pytest.raises(GateFailed, match=r"x\.onnx has NaN or infinite logits for 1 of 1000"):
        replace(baseline, predictions={"x.onnx": predict(broken)}, labelled=None)


def test_a_baseline_that_cannot_be_written(baseline: Baseline, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(StorageFailed, match="a_file"):
        baseline.save(tmp_path / "a_file" / "baseline.npz")


@pytest.mark.parametrize(
    ("contract", "teacher", "says"),
    [
        (replace(CONTRACT, num_classes=6, class_names=None), TEACHER, "another image contract: num_classes 5, here 6"),
        (CONTRACT, "ef" * 32, "another teacher: sha256 abababababab…, here efefefefefef…"),
        (replace(CONTRACT, mean=(0.4,)), TEACHER, "another image contract: mean"),
        (replace(CONTRACT, input_size=(1, 8, 8)), None, "another image contract: input_size"),
        (replace(CONTRACT, class_names=("b", "a", "c", "d", "e")), None, "another image contract: class_names"),
    ],
)
def test_a_baseline_of_something_else_is_refused(
    contract: ImageContract, teacher: str | None, says: str, baseline: Baseline
) -> None:
    with pytest.raises(DfadcError, match=says) as caught:
        baseline.check_fits(contract, teacher)
    assert caught.value.exit_code == 2


def test_a_baseline_of_the_same_fits(baseline: Baseline) -> None:
    baseline.check_fits(CONTRACT, TEACHER)
    baseline.check_fits(CONTRACT, None)


def verdict_after(baseline: Baseline, classes: NDArray[np.int32], max_drop: float | None = 0.01) -> Verdict:
    found = compare_with_baseline(baseline, "student", classes=classes, correct=None)
    (check,) = baseline_checks(found, max_drop)
    assert check.comparison == "D"
    return check.verdict


def test_the_same_answers_pass(baseline: Baseline) -> None:
    found = compare_with_baseline(baseline, NAME, classes=baseline.predictions[NAME], correct=None)
    assert found is not None
    assert found.accuracy is None
    assert {source: (pairs.n, pairs.before, pairs.drop) for source, pairs in found.agreement.items()} == {
        GATED: (800, 1 - 110 / 800, 0),
        "prior": (800, 1 - 110 / 800, 0),
        "generator": (100, 1, 0),
        "snapshots": (60, 1, 0),
        "adversary": (40, 1, 0),
    }
    assert [check.verdict for check in baseline_checks(found, 0.01)] == [Verdict.PASS]


def test_a_drop_fails_where_it_is_larger_than_allowed_and_no_chance(baseline: Baseline) -> None:
    teacher = predict(baseline.samples.teacher_logits)
    assert verdict_after(baseline, wrong(teacher, slice(130))) is Verdict.FAIL  # 30 of 800 lost, none gained
    assert verdict_after(baseline, wrong(teacher, slice(130)), 0.04) is Verdict.PASS
    assert verdict_after(baseline, wrong(teacher, slice(105)), 0.0) is Verdict.FAIL  # 5 lost, p = .031
    assert verdict_after(baseline, wrong(teacher, slice(104)), 0.0) is Verdict.PASS  # 4 lost, p = .063
    # 30 lost again, but 100 gained.
    assert verdict_after(baseline, wrong(teacher, slice(100, 130))) is Verdict.PASS
    # 120 lost and 100 gained: 2.5 points, p = .1; 130 lost and 100 gained: p = .03.
    assert verdict_after(baseline, wrong(teacher, slice(100, 220))) is Verdict.PASS
    assert verdict_after(baseline, wrong(teacher, slice(100, 230))) is Verdict.FAIL


def test_what_the_baselines_own_student_had_a_say_in_is_reported_and_not_judged(baseline: Baseline) -> None:
    """Losses there are no failure of a network distilled anew, and gains there must not pay for losses elsewhere."""
    classes = wrong(baseline.predictions["student"], slice(800, 1000))
    found = compare_with_baseline(baseline, "student", classes=classes, correct=None)
    assert found is not None
    assert [found.agreement[source].lost for source in ("generator", "snapshots", "adversary")] == [100, 60, 40]
    assert found.agreement[GATED].lost == 0
    assert verdict_after(baseline, classes) is Verdict.PASS
    teacher = predict(baseline.samples.teacher_logits)
    flawed = replace(baseline, predictions={"student": wrong(teacher, slice(700, 1000))}, labelled=None)
    assert verdict_after(flawed, wrong(teacher, slice(660, 800))) is Verdict.FAIL  # 200 gained, but 40 lost of prior


def test_few_labels_can_fail_and_the_fewest_cannot_tell(baseline: Baseline) -> None:
    """All of five labelled images lost is a drop; of four it could not be told, so four right answers fail too."""
    classes, right = baseline.predictions["student"], np.ones(5, np.bool_)
    known = LabelledResults("cd" * 32, {"student": right})
    few = replace(baseline, predictions={"student": classes}, labelled=known)
    fewer = replace(few, labelled=LabelledResults("cd" * 32, {"student": right[:4]}))
    for held, correct, verdict, says in (
        (few, ~right, Verdict.FAIL, "5 lost and 0 gained of 5, one-sided exact McNemar p = 0.031"),
        (few, right, Verdict.PASS, "(5 pairs cannot show a drop of less than 100 points)"),
        (fewer, ~right[:4], Verdict.FAIL, "too few to tell"),
        (fewer, right[:4], Verdict.FAIL, "too few to tell, for even the loss of all 4 that were correct before"),
    ):
        found = compare_with_baseline(held, "student", classes=classes, correct=correct)
        _, accuracy = baseline_checks(found, 0.01)
        assert accuracy.verdict is verdict
        assert says in accuracy.message


def test_drops_that_so_few_pairs_cannot_show_are_noted(baseline: Baseline) -> None:
    right = dict.fromkeys(baseline.predictions, np.ones(20, np.bool_))
    few = replace(baseline, labelled=LabelledResults("cd" * 32, right))
    note = "baseline: accuracy may drop by 1 points (20 pairs cannot show a drop of less than 25 points)"
    assert unseen_drops(few, 0.01, with_labels=True) == [note]
    assert unseen_drops(few, 0.25, with_labels=True) == unseen_drops(few, None, with_labels=True) == []
    assert unseen_drops(few, 0.01, with_labels=False) == []
    (agreement, _) = unseen_drops(few, 0.006, with_labels=True)
    assert "agreement may drop by 0.6 points (800 pairs cannot show a drop of less than 0.625 points)" in agreement


def test_labels_are_a_test_of_their_own(baseline: Baseline) -> None:
    classes = baseline.predictions["student"]
    found = compare_with_baseline(baseline, "student", classes=classes, correct=np.arange(NUM_LABELLED) >= 60)
    agreement, accuracy = baseline_checks(found, 0.01)
    assert (agreement.gate, agreement.verdict) == ("drop", Verdict.PASS)
    assert (accuracy.gate, accuracy.verdict) == ("accuracy drop", Verdict.FAIL)
    assert "accuracy on labelled images was 90.00% and is 85.00%: 20 lost and 0 gained of 400" in accuracy.message


def test_nan_fails_however_few(baseline: Baseline) -> None:
    classes = baseline.predictions["student"].copy()
    classes[0] = -1
    assert verdict_after(baseline, classes) is Verdict.FAIL
    assert verdict_after(baseline, classes, None) is Verdict.FAIL


def test_a_network_that_is_new_and_a_gate_that_is_off_are_not_gated(baseline: Baseline) -> None:
    assert verdict_after(baseline, baseline.predictions["student"], None) is Verdict.NOT_GATED
    assert compare_with_baseline(baseline, "new.onnx", classes=baseline.predictions[NAME], correct=None) is None
    assert [check.verdict for check in baseline_checks(None, 0.01)] == [Verdict.NOT_GATED]


def test_no_samples_that_were_made_without_a_student_fail(baseline: Baseline) -> None:
    none_drawn = replace(baseline.samples, source=np.ones(N, np.int8))
    other_names = replace(baseline.samples, sources=("generator", "snapshots", "other", "adversary"))
    for samples in (none_drawn, other_names):
        only = replace(baseline, samples=samples)
        found = compare_with_baseline(only, "student", classes=only.predictions["student"], correct=None)
        (check,) = baseline_checks(found, 0.01)
        assert check.verdict is Verdict.FAIL
        assert "no samples of source 'prior', made for the teacher alone" in check.message
        assert describe_baseline(only, {}, max_drop=0.01)["gated_sources"] == []


def test_too_few_samples_of_the_gates_source_fail(baseline: Baseline) -> None:
    """Four right answers among many samples of other sources."""
    few = replace(baseline, samples=replace(baseline.samples, source=(np.arange(N) < N - 4).astype(np.int8)))
    assert verdict_after(few, few.predictions["student"]) is Verdict.FAIL


def test_the_description_is_json(baseline: Baseline) -> None:
    classes = baseline.predictions["student"]
    compared = {
        name: compare_with_baseline(baseline, name, classes=classes, correct=None) for name in ("student", "new.onnx")
    }
    described = describe_baseline(baseline, compared, max_drop=0.01)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described["new"] == ["new.onnx"]
    assert described["gated_sources"] == ["prior"]
    assert described["data"] is None
    assert described["networks"]["student"]["agreement"][GATED]["p_value"] == 1
