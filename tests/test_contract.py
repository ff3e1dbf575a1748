"""The image contract: what it refuses, what it derives, and how several sources become one."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfadc.contract import STANDARDISED_BOUND, ContractFields, ImageContract, merge_fields
from dfadc.errors import DfadcError

VALID: dict[str, Any] = {"input_size": (3, 32, 32), "num_classes": 10}
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@st.composite
def contracts(draw: st.DrawFn) -> ImageContract:
    channels, num_classes = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    pixels = st.none() | st.lists(st.floats(0.01, 2), min_size=channels, max_size=channels).map(tuple)
    std = draw(pixels)
    names = st.none() | st.lists(st.text(), min_size=num_classes, max_size=num_classes).map(tuple)
    return ImageContract(
        input_size=(channels, draw(st.integers(1, 600)), draw(st.integers(1, 600))),
        num_classes=num_classes,
        mean=None if std is None else tuple(value / 2 for value in std),
        std=std,
        class_names=draw(names),
        task=draw(st.sampled_from(["classification", "multilabel", "segmentation"])),
    )


@settings(deadline=None, max_examples=60)
@given(contract=contracts())
def test_a_contract_survives_json(contract: ImageContract) -> None:
    text = contract.to_json()
    assert "\n" not in text
    assert ImageContract.from_dict(json.loads(text)) == contract


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"input_size": (0, 32, 32)}, "side below 1"),
        ({"input_size": (3, 32, -1)}, "side below 1"),
        ({"num_classes": 1}, "num_classes = 1; distillation needs at least 2"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std must be given together"),
        ({"std": (0.5, 0.5, 0.5)}, "mean and std must be given together"),
        ({"mean": (0.5,), "std": (0.5, 0.5, 0.5)}, "mean has 1 values for 3 channels"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5)}, "std has 2 values for 3 channels"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.0, 0.5)}, "std must be above 0"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, -1.0, 0.5)}, "std must be above 0"),
        ({"mean": (0.5, float("nan"), 0.5), "std": (1.0, 1.0, 1.0)}, "mean must be finite"),
        ({"mean": (0.5, 0.5, 0.5), "std": (1.0, float("nan"), 1.0)}, "std must be finite"),
        ({"mean": (0.5, 0.5, 0.5), "std": (1.0, float("inf"), 1.0)}, "std must be finite"),
        ({"class_names": ("cat", "dog")}, "2 class names for 10 classes"),
    ],
)
def test_an_impossible_contract_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(DfadcError, match=problem):
        ImageContract(**{**VALID, **changes})


@pytest.mark.parametrize(
    ("mean", "std", "right"),
    [
        # ImageNet's, as Keras and OpenCV write them; MNIST's; TensorFlow's; Caffe's, which subtracts alone.
        (
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            "mean and std by 255: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
        ),
        ((33.3285,), (78.5655,), "mean and std by 255: --mean 0.1307 --std 0.3081"),
        ((127.5,), (127.5,), "mean and std by 255: --mean 0.5 --std 0.5"),
        ((103.939,), (1.0,), "mean and std by 255: --mean 0.4076 --std 0.003922"),
        ((0.0,), (255.0,), "std by 255: --mean 0 --std 1"),
        # Each in a unit of its own.
        ((123.675,), (0.229,), "mean by 255: --mean 0.485 --std 0.229"),
        ((0.485,), (58.395,), "std by 255: --mean 0.485 --std 0.229"),
        ((-123.675,), (58.395,), "mean and std by 255"),
    ],
)
def test_a_mean_or_std_of_pixels_in_0_to_255_is_refused_with_the_right_one(
    mean: tuple[float, ...], std: tuple[float, ...], right: str
) -> None:
    size = (len(mean), 8, 8)
    with pytest.raises(DfadcError, match=r"are of pixels in 0\.\.255") as caught:
        ImageContract(size, 10, mean=mean, std=std)
    assert right in caught.value.hint
    # From a file as well.
    with pytest.raises(DfadcError, match=r"0\.\.255"):
        ImageContract.from_dict({"input_size": size, "num_classes": 10, "mean": mean, "std": std})


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.1307, 1.0),
        (0.1307, 0.5),
        (0.0, 1.0),
        (1.0, 1.0),
        (0.5, 2.0),
        (0.0, 1 / 255),
        (103.939 / 255, 1 / 255),
        (-0.5, 0.5),
        (1e-6, 1e-3),
    ],
)
def test_a_mean_and_std_that_some_network_may_want_are_taken(mean: float, std: float) -> None:
    assert ImageContract((1, 8, 8), 10, mean=(mean,), std=(std,)).has_pixels


def test_the_range_of_pixels_follows_mean_and_std() -> None:
    low, high = ImageContract(**VALID, **IMAGENET).value_range()
    for channel in range(3):
        mean, std = IMAGENET["mean"][channel], IMAGENET["std"][channel]
        assert low[channel] * std + mean == pytest.approx(0.0)
        assert high[channel] * std + mean == pytest.approx(1.0)


def test_without_mean_and_std_the_range_is_three_deviations() -> None:
    contract = ImageContract(**VALID)
    assert not contract.has_pixels
    assert contract.value_range() == ((-STANDARDISED_BOUND,) * 3, (STANDARDISED_BOUND,) * 3)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"colour": "red"}, "unknown contract field 'colour'"),
        ({"input_size": [3, 32]}, "input_size has 2 values"),
        ({"input_size": "33232"}, "is text, not a list"),
        ({"input_size": "332"}, "is text, not a list"),
        ({"input_size": [3, 32.5, 32]}, "32.5 is not a whole number"),
        ({"input_size": 32}, "malformed contract"),
        ({"input_size": [3, None, 32]}, "malformed contract"),
        ({"num_classes": "ten"}, "malformed contract"),
        ({"num_classes": 10.5}, "10.5 is not a whole number"),
        ({"num_classes": float("inf")}, "malformed contract"),
        ({"num_classes": True}, "True is not a whole number"),
        ({"mean": "123"}, "is text, not a list"),
        ({"mean": ["x"]}, "malformed contract"),
        ({"class_names": "0123456789"}, "is text, not a list"),
        ({"class_names": 10}, "malformed contract"),
        ({"task": "detection"}, "'detection' is none of classification, multilabel, segmentation"),
    ],
)
def test_malformed_values_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(DfadcError, match=problem):
        ContractFields.from_dict(values)


def test_an_unknown_field_is_answered_with_the_known_ones() -> None:
    with pytest.raises(DfadcError) as caught:
        ContractFields.from_dict({"size": [3, 32, 32]})
    assert "input_size" in caught.value.hint


@pytest.mark.parametrize(
    ("known", "problem", "flag"),
    [
        ({"num_classes": 10}, "input size is unknown", "--input-size"),
        ({"input_size": (3, 32, 32)}, "number of classes is unknown", "--num-classes"),
    ],
)
def test_what_is_missing_is_asked_for(known: dict[str, Any], problem: str, flag: str) -> None:
    with pytest.raises(DfadcError, match=problem) as caught:
        ContractFields(**known).complete()
    assert flag in caught.value.hint


def test_partial_fields_are_completed_as_classification() -> None:
    assert ContractFields(**VALID).complete() == ImageContract(**VALID, task="classification")


def test_the_first_source_that_knows_a_field_wins() -> None:
    merged, origin = merge_fields(
        {
            "--num-classes": ContractFields(num_classes=5),
            "the file": ContractFields(input_size=(1, 28, 28), num_classes=10, task="segmentation"),
            "the library": ContractFields(input_size=(3, 224, 224), **IMAGENET),
        }
    )
    assert merged == ContractFields(input_size=(1, 28, 28), num_classes=5, task="segmentation", **IMAGENET)
    assert origin == {
        "num_classes": "--num-classes",
        "input_size": "the file",
        "task": "the file",
        "mean": "the library",
        "std": "the library",
    }


def test_mean_and_std_are_never_mixed_from_two_sources() -> None:
    ours, theirs = ((0.1,), (0.2,)), ((0.3,), (0.4,))
    merged, origin = merge_fields(
        {
            "flags": ContractFields(num_classes=2),
            "one": ContractFields(mean=ours[0], std=ours[1]),
            "other": ContractFields(mean=theirs[0], std=theirs[1]),
        }
    )
    assert (merged.mean, merged.std) == ours
    assert origin["mean"] == origin["std"] == "one"


@pytest.mark.parametrize("lone", [{"mean": (0.5,)}, {"std": (0.5,)}])
def test_a_source_with_half_a_pair_is_refused_by_name(lone: dict[str, Any]) -> None:
    with pytest.raises(DfadcError, match="the flags gives only one of mean and std"):
        merge_fields({"the flags": ContractFields(**lone), "the file": ContractFields(mean=(0.1,), std=(0.2,))})


def test_nothing_merged_is_nothing_known() -> None:
    assert merge_fields({}) == (ContractFields(), {})


def test_fields_and_contract_have_the_same_names() -> None:
    assert [field.name for field in fields(ContractFields)] == [field.name for field in fields(ImageContract)]
    assert set(ImageContract(**VALID).to_dict()) == {field.name for field in fields(ImageContract)}
