"""Checkpoints of any structure, and damaged ones: a teacher or one clear error, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.names import build_architecture
from dfadc.teacher.load import inspect_teacher, load_teacher

if TYPE_CHECKING:
    from pathlib import Path

GREY = ContractFields(input_size=(1, 28, 28))
NETWORK = build_architecture("lenet5", ImageContract((1, 28, 28), 5)).module
WEIGHTS = dict(NETWORK.state_dict())
KEYS = st.sampled_from(
    [*("a", "model", "state_dict", "ema", "args", "classes", "mean", "std", "img_size", "optimizer", "arch"), 3, None]
)
LEAVES = st.sampled_from(
    [
        *(1, 2.5, "resnet18", None, True, b"b", float("nan"), np.float64(1), WEIGHTS, NETWORK),
        *(torch.ones(2), torch.tensor(3), torch.zeros(0), {f"m.{key}": tensor for key, tensor in WEIGHTS.items()}),
    ]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["model", "mean", "classes", "img_size"]), inner).map(
            lambda arguments: argparse.Namespace(**arguments)
        ),
    ),
    max_leaves=6,
)


def assert_teaches_or_refuses(path: Path) -> None:
    inspect_teacher(path, fields=GREY)
    for choices in ({}, {"architecture": "lenet5"}, {"weights": "ema"}):
        with contextlib.suppress(DfadcError):
            load_teacher(path, fields=GREY, **choices)  # type: ignore[arg-type]


@given(value=VALUES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_structure(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "t.pt")
    assert_teaches_or_refuses(tmp_path / "t.pt")


@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_pickle_with_wrong_bytes(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(img_size=28, classes=["a"])}, tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = bytearray(members["t/data.pkl"])
    for place, value in flips:
        pickled[place % len(pickled)] = value
    with zipfile.ZipFile(tmp_path / "t.pt", "w") as archive:
        for name, data in (members | {"t/data.pkl": bytes(pickled)}).items():
            archive.writestr(name, data)
    with contextlib.suppress(DfadcError):
        inspect_teacher(tmp_path / "t.pt", fields=GREY)
