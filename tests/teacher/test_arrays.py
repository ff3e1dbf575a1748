"""NumPy arrays in checkpoints: read from inert records, in every form that NumPy pickles them in."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dfadc.teacher.arrays import tensor_of_array
from dfadc.teacher.unpickle import Record, inert_pickle_module

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read(array: NDArray[Any], protocol: int = 2) -> object:
    """The record of an array in a file of torch.save."""
    stream = io.BytesIO()
    torch.save({"weight": array}, stream, pickle_protocol=protocol)
    stream.seek(0)
    value = torch.load(stream, weights_only=False, pickle_module=inert_pickle_module(), encoding="latin1")
    record = value["weight"]
    assert isinstance(record, Record)
    return record


NUMBERS = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        NUMBERS.astype(np.float32),
        NUMBERS.astype(np.float16),
        NUMBERS.astype(">f8"),
        np.asfortranarray(NUMBERS.astype(np.float32)),
        NUMBERS.astype(np.float32).transpose(2, 0, 1),
        NUMBERS.astype(np.int64),
        np.array(7, np.int64),
        NUMBERS > 3,
        np.zeros((0, 3), np.float32),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}{array.strides}",
)
def test_an_array_is_the_tensor_of_its_numbers(array: NDArray[Any], protocol: int) -> None:
    for found in (tensor_of_array(read(array, protocol)), tensor_of_array(array)):
        assert found is not None
        assert found.is_contiguous()
        np.testing.assert_array_equal(found.numpy(), array)


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.zeros(3, np.uint64), np.zeros(3, "M8[s]")])
def test_other_arrays_are_no_tensors(array: NDArray[Any]) -> None:
    assert tensor_of_array(read(array)) is None
    assert tensor_of_array(array) is None
    assert tensor_of_array([1.0]) is None


@pytest.mark.parametrize(
    "state",
    [
        (1, (2, 3), "f4", False, b""),
        (1, (2, 3), Record("numpy.dtype", ("f4",)), False, b"\0" * 20),
        (1, (-2, -3), Record("numpy.dtype", ("f4",)), False, b"\0" * 24),
        (1, ("a",), Record("numpy.dtype", ("f4",)), False, b"\0" * 4),
        (1, (2,), Record("numpy.dtype", ("O",)), False, b"\0" * 16),
        (1, (2,), Record("numpy.dtype", (4,)), False, b"\0" * 16),
        (1, (2,), Record("numpy.dtype"), False, b"\0" * 8),
        (1, (2,), Record("numpy.dtype", ("f4",)), False, [1.0, 2.0]),
    ],
)
def test_a_record_that_contradicts_itself_is_no_tensor(state: tuple[object, ...]) -> None:
    record = Record("numpy.core.multiarray._reconstruct")
    record.state = state
    assert tensor_of_array(record) is None
