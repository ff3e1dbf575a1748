"""Channels that one INT8 scale fits better: the function stays, the widths change, and INT8 gains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from dfadc.verification.agreement import compare
from exporters.equalise import equalise_channels
from exporters.onnx_exporter import export_onnx
from exporters.onnx_file import load_onnx
from exporters.precision import activations
from exporters.quantise import quantise
from exporters.sensitivity import logits_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dfadc.contract import ImageContract

WIDTH = 16
#: How much wider than the first channel each channel is.
WIDTHS = np.logspace(0, 3, WIDTH, dtype=np.float32)


class Separable(nn.Module):
    """A convolution, something between, a depthwise convolution of 2 outputs a channel, a pointwise one, logits."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, stride=2)
        self.between = between
        self.depthwise = nn.Conv2d(WIDTH, 2 * WIDTH, 3, groups=WIDTH, bias=False)
        self.pointwise = nn.Conv2d(2 * WIDTH, 32, 1)
        self.classifier = nn.Linear(32, 10)
        widths = torch.from_numpy(WIDTHS)
        with torch.no_grad():
            self.first.weight *= widths.reshape(-1, 1, 1, 1) / 100
            self.first.bias *= widths / 100  # type: ignore[operator]
            self.depthwise.weight *= 100 / widths.repeat_interleave(2).reshape(-1, 1, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) -> logits (N, 10)."""
        features = torch.relu(self.depthwise(self.between(self.first(images))))
        logits: torch.Tensor = self.classifier(torch.relu(self.pointwise(features)).mean(dim=(2, 3)))
        return logits


@pytest.fixture(scope="module")
def separable(contract: ImageContract, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], onnx.ModelProto]:
    """The network with what is named between: exported once each, and given out as a copy."""
    modules = {"relu": nn.ReLU(), "relu6": nn.ReLU6(), "nothing": nn.Identity()}
    exported: dict[str, Path] = {}

    def give(between: str) -> onnx.ModelProto:
        if between not in exported:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                network = Separable(modules[between]).eval()
            path = tmp_path_factory.mktemp("separable") / "student.onnx"
            exported[between] = export_onnx(network, path, contract=contract, metadata={"architecture": "x"}).path
        return load_onnx(exported[between])

    return give


def widths_before_depthwise(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """(C,) largest magnitude of each channel that the depthwise convolution reads."""
    (name,) = {node.input[0] for node in model.graph.node if node.name.startswith("depthwise")}
    values = np.concatenate([values for found, values in activations(model, images) if found == name])
    widths: np.ndarray = np.abs(values).max(axis=(0, 2, 3))
    return widths


@pytest.mark.parametrize("between", ["relu", "relu6", "nothing"])
def test_the_function_stays_and_channels_become_equally_wide(
    between: str, separable: Callable[[str], onnx.ModelProto], images: np.ndarray
) -> None:
    source = separable(between)
    untouched = source.SerializeToString()
    equalised = equalise_channels(source, images)
    assert source.SerializeToString() == untouched
    reference = logits_of(source, images)
    np.testing.assert_allclose(logits_of(equalised, images), reference, atol=2e-5 * np.abs(reference).max())
    before, after = widths_before_depthwise(source, images), widths_before_depthwise(equalised, images)
    widest = before.max()
    assert before.min() < widest / 20
    np.testing.assert_allclose(after, np.minimum(widest, 32 * before), rtol=1e-4)
    assert {entry.key for entry in equalised.metadata_props} == {entry.key for entry in source.metadata_props}


def test_int8_gains(
    separable: Callable[[str], onnx.ModelProto], images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = separable("relu")
    gained = quantise(source, images, calibrator="minmax").held_out
    monkeypatch.setattr("exporters.quantise.equalise_channels", lambda source, images: source)
    assert gained.sqnr_db > quantise(source, images, calibrator="minmax").held_out.sqnr_db + 3


def test_a_real_mobilenet_answers_the_same(student_onnx: Path, images: np.ndarray) -> None:
    source = load_onnx(student_onnx)
    equalised = equalise_channels(source, images)
    assert compare(logits_of(equalised, images), logits_of(source, images)).sqnr_db > 80
    weights = {tensor.name: tensor for tensor in equalised.graph.initializer}
    changed = [
        tensor.name
        for tensor in source.graph.initializer
        if numpy_helper.to_array(tensor).tobytes() != numpy_helper.to_array(weights[tensor.name]).tobytes()
    ]
    # Of 7 depthwise convolutions, each with its writer and bias, one reads channels that are all clipped at 6.
    assert len(changed) == 6 * 3


@pytest.mark.parametrize(
    "reason", ["not proportional", "clipped from below", "read twice", "answered", "not depthwise"]
)
def test_what_would_change_the_function_or_gain_nothing_is_left_alone(
    reason: str, separable: Callable[[str], onnx.ModelProto], images: np.ndarray
) -> None:
    source = separable("relu6" if reason == "clipped from below" else "relu")
    graph = source.graph
    between = next(node for node in graph.node if node.op_type in ("Relu", "Clip"))
    if reason == "not proportional":
        between.op_type = "HardSwish"
    elif reason == "clipped from below":
        floor = next(tensor for tensor in graph.initializer if tensor.name == between.input[1])
        floor.CopyFrom(numpy_helper.from_array(np.array(0.1, np.float32), floor.name))
    elif reason == "read twice":
        graph.node.append(onnx.helper.make_node("Relu", [between.output[0]], ["other"]))
    elif reason == "answered":
        graph.output.append(onnx.ValueInfoProto(name=between.output[0]))
    else:
        depthwise = next(node for node in graph.node if between.output[0] in node.input)
        next(attribute for attribute in depthwise.attribute if attribute.name == "group").i = WIDTH // 2
    assert equalise_channels(source, images) is source


def test_channels_that_never_move_are_left_alone(
    separable: Callable[[str], onnx.ModelProto], images: np.ndarray
) -> None:
    source = separable("relu")
    for tensor in source.graph.initializer:
        if tensor.name.startswith("first"):
            tensor.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(tensor), tensor.name))
    np.testing.assert_array_equal(logits_of(equalise_channels(source, images), images), logits_of(source, images))
