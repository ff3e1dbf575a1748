"""Comparing states bit by bit, for the tests around."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_same_state(one: Any, other: Any, path: str = "") -> None:
    """Compares two states bit by bit, whatever they nest; names the first value that differs."""
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0)), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same_state(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same_state(*pair, f"{path}[{index}]")
    else:
        assert one == other, path
