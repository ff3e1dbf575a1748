"""NumPy arrays of a pickle as tensors, read from the inert records that stand for them: nothing of NumPy is called."""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor

from dfadc.teacher.unpickle import Record

#: Names under which arrays of any version of NumPy are pickled, by protocols up to 4 and by protocol 5.
_REBUILT = re.compile(r"numpy\.(_?core\.)?multiarray\._reconstruct")
_FROM_BUFFER = re.compile(r"numpy\._?core\.numeric\._frombuffer")
#: Types of numbers that torch has, too.
_NUMBERS = re.compile(r"[fiu][1248]|b1")


def tensor_of_array(value: object) -> Tensor | None:
    """The tensor of a NumPy array, or of its record; None for anything else, and for numbers that torch does not have.

    Args:
        value: an array of a trusted file, or a record.
    """
    if isinstance(value, np.ndarray):
        is_number = _NUMBERS.fullmatch(value.dtype.str[1:]) and value.dtype != np.uint64
        return _tensor(value) if is_number else None
    if not isinstance(value, Record):
        return None
    state = value.state
    if _REBUILT.fullmatch(value.name) and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, is_fortran, data = state
        return _from_parts(data, dtype, shape, "F" if is_fortran else "C")
    if _FROM_BUFFER.fullmatch(value.name) and len(value.arguments) >= 4:
        data, dtype, shape, order, *axes = value.arguments
        found = _from_parts(data, dtype, shape, "C" if axes else str(order))
        if found is None or not axes:
            return found
        permutation = axes[0]
        if isinstance(permutation, tuple) and sorted(permutation) == list(range(found.ndim)):
            return found.permute(permutation).contiguous()
    return None


def _from_parts(data: object, dtype: object, shape: object, order: str) -> Tensor | None:
    """A tensor of bytes, the record of their type, and their shape; None where they are not of one array."""
    kind = _kind_of(dtype)
    if kind is None or not isinstance(data, bytes | bytearray) or not isinstance(shape, tuple):
        return None
    sides = [side for side in shape if isinstance(side, int) and side >= 0]
    if len(sides) != len(shape) or math.prod(sides) * kind.itemsize != len(data):
        return None
    numbers = np.frombuffer(data, kind)
    return _tensor(numbers.reshape(sides[::-1]).T if order == "F" else numbers.reshape(sides))


def _kind_of(dtype: object) -> np.dtype[np.generic] | None:
    """The type of numbers that a record names; None for one that torch does not have."""
    if not isinstance(dtype, Record) or dtype.name != "numpy.dtype" or not dtype.arguments:
        return None
    kind, state = dtype.arguments[0], dtype.state
    if not isinstance(kind, str) or not _NUMBERS.fullmatch(kind) or kind == "u8":
        return None
    is_big = isinstance(state, tuple) and len(state) > 1 and state[1] == ">"
    return np.dtype(kind).newbyteorder(">" if is_big else "<")


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    """A copy in the machine's order of bytes and row by row."""
    native = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
    return torch.from_numpy(native)
