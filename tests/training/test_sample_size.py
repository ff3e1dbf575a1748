"""Gates that a perfect copy passes at any size, and that a damaged one does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.pipeline.gates import gate_thresholds
from dfadc.recipe.load import load_recipe
from dfadc.recipe.schema import VerifySettings
from dfadc.training.sample_size import (
    FILE_BYTES,
    check_accuracy_can_pass,
    check_gates_can_pass,
    choose_num_samples,
    size_note,
)
from dfadc.verification.checks import Verdict
from dfadc.verification.judge import ArtifactFile, verify_artifact
from dfadc.verification.samples import SampleSet, sample_bytes

PRECISIONS = ("fp32", "fp16", "int8")
RECIPE = load_recipe("auto")
THRESHOLDS = gate_thresholds(RECIPE)


def contract(size: int, num_classes: int, **fields: Any) -> ImageContract:
    return ImageContract((3, size, size), num_classes, mean=(0.5,) * 3, std=(0.5,) * 3, **fields)


def frozen(size: int, num_classes: int) -> SampleSet:
    """A set as a run freezes it, with random teacher's logits and a student that answers exactly so."""
    of = contract(size, num_classes)
    total = choose_num_samples(RECIPE.verify, of)
    # Images that nobody looks at here: one pixel in memory, whatever their size.
    images = np.broadcast_to(np.zeros((), np.uint8), (total, *of.input_size))
    logits = np.random.default_rng(num_classes).normal(size=(total, num_classes)).astype(np.float32)
    source = (np.arange(total) % 2).astype(np.int8)
    return SampleSet(images, source, ("generator", "prior"), logits, logits, of)


@pytest.mark.parametrize(
    ("size", "num_classes"),
    [(8, 2), (28, 10), (64, 200), (164, 1000), (171, 10), (224, 10), (224, 1000), (512, 10)],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_perfect_copy_passes_and_one_with_a_twentieth_changed_fails(
    size: int, num_classes: int, precision: str
) -> None:
    samples, artifact = frozen(size, num_classes), ArtifactFile("student.onnx", precision)
    changed = samples.student_logits.copy()
    rows = np.arange(len(samples)) % 20 == 0
    changed[rows] = np.roll(changed[rows], 1, axis=1)
    exact, damaged = (
        verify_artifact(artifact, logits, samples=samples, thresholds=THRESHOLDS)
        for logits in (samples.student_logits, changed)
    )
    assert exact.judgement.verdict is Verdict.PASS, exact.judgement.reasons
    assert damaged.judgement.verdict is Verdict.FAIL


def test_a_perfect_copy_passes_with_more_classes_than_samples() -> None:
    samples = frozen(224, 3000)
    exact = verify_artifact(
        ArtifactFile("student.onnx", "fp16"), samples.student_logits, samples=samples, thresholds=THRESHOLDS
    )
    assert exact.judgement.verdict is Verdict.PASS, exact.judgement.reasons


@settings(deadline=None, max_examples=200)
@given(size=st.integers(8, 512), num_classes=st.integers(2, 21_841), channels=st.sampled_from([1, 3]))
def test_every_default_gate_has_samples_enough(size: int, num_classes: int, channels: int) -> None:
    of = ImageContract((channels, size, size), num_classes, mean=(0.5,) * channels, std=(0.5,) * channels)
    check_gates_can_pass(RECIPE.verify, of, PRECISIONS)
    total = choose_num_samples(RECIPE.verify, of)
    assert 957 <= total <= 2048
    assert total == 957 or total * sample_bytes(of) <= FILE_BYTES
    assert (size_note(RECIPE.verify, of) is None) == (total == 2048)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(8, 2048), num_classes=st.integers(2, 1000))
def test_dense_answers_are_judged_on_images_enough_for_an_interval(size: int, num_classes: int) -> None:
    of = contract(size, num_classes, task="segmentation")
    check_gates_can_pass(RECIPE.verify, of, PRECISIONS)
    assert RECIPE.verify.count_of("prior", choose_num_samples(RECIPE.verify, of)) >= 10


@pytest.mark.parametrize(
    ("changes", "precisions", "message"),
    [
        (
            {"num_samples": 256},
            ("fp16",),
            "verify.min_fp16_agreement = 0.995 cannot be reached with verify.num_samples",
        ),
        ({"num_samples": 100}, ("int8",), "verify.min_int8_agreement = 0.97"),
        ({"num_samples": 16}, (), "verify.min_agreement = 0.7"),
        ({"min_agreement": 0.9999}, (), "set verify.num_samples to 96028 or more, or lower verify.min_agreement"),
        ({"min_fp16_agreement": 1.0}, ("fp16",), "below 1 for any number of samples"),
    ],
)
def test_what_a_perfect_copy_cannot_pass_is_refused(
    changes: dict[str, Any], precisions: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DfadcError) as caught:
        check_gates_can_pass(VerifySettings(**changes), contract(32, 10), precisions)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_a_gate_of_an_artifact_that_is_not_made_refuses_nothing() -> None:
    check_gates_can_pass(VerifySettings(num_samples=256), contract(32, 10), ("fp32", "int8"))
    check_gates_can_pass(VerifySettings(num_samples=2, min_agreement="off"), contract(32, 10), ("fp32",))


def test_labelled_images_must_be_able_to_show_the_accuracy_that_is_asked_for() -> None:
    check_accuracy_can_pass(0.9, 100, contract(8, 10))
    with pytest.raises(DfadcError, match=r"20 of 20 labelled images would only show 83\.89%"):
        check_accuracy_can_pass(0.9, 20, contract(8, 10))
    with pytest.raises(DfadcError):
        check_accuracy_can_pass(0.5, 9, contract(8, 10, task="segmentation"))
