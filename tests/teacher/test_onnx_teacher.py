"""ONNX teachers: conversion, what is cut or made dynamic, refusals, and a run from the command line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from command_line import run_command, settings
from conftest import QUICK_RECIPE
from onnx import TensorProto, helper
from onnx_files import (
    SIZE,
    classifier,
    export,
    export_by_tracing,
    graph_of,
    of_runtime,
    saved,
    small_network,
    torchvision_network,
)
from torch import Tensor, nn

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError, RequirementMissing
from dfadc.teacher.load import inspect_teacher, load_teacher
from dfadc.teacher.read import read_teacher_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

onnx2fx = pytest.importorskip("onnx2fx")


@pytest.fixture(scope="module")
def shuffling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ShuffleNet, whose shapes are computed in the graph; torch takes seconds to export it."""
    network = torchvision_network("shufflenet_v2_x0_5")
    return export(network, tmp_path_factory.mktemp("shuffling") / "teacher.onnx", opset=20)


@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        ("shufflenet_v2_x0_5", export),
        *((name, export_by_tracing) for name in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5")),
        # torch.export takes seconds for each.
        *(pytest.param(name, export, marks=pytest.mark.slow) for name in ("resnet18", "mobilenet_v3_small")),
    ],
)
def test_torchvision_networks_are_the_same_as_onnx(
    name: str, exporter: Callable[..., Path], shuffling: Path, tmp_path: Path
) -> None:
    network = torchvision_network(name)
    is_there = (name, exporter) == ("shufflenet_v2_x0_5", export)
    path = shuffling if is_there else exporter(network, tmp_path / "teacher.onnx", opset=17)
    teacher = load_teacher(path)
    assert teacher.contract.input_size == SIZE
    assert teacher.contract.num_classes == 10
    assert teacher.contract_sources["input_size"] == "the graph of the ONNX file"
    assert teacher.num_parameters > 0.99 * sum(
        parameter.numel() for parameter in network.parameters() if parameter.ndim > 1
    )
    assert any("exporters fold them" in note for note in teacher.notes)
    images = torch.rand(7, *SIZE)
    expected = of_runtime(path, images)
    assert (teacher.logits(images) - expected).abs().max() < 1e-5 * (expected.max() - expected.min())
    gradients = []
    for module in (teacher.module, network):
        copy = images.clone().requires_grad_()
        (module(copy) ** 2).sum().backward()
        assert copy.grad is not None
        gradients.append(copy.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()


@pytest.mark.parametrize("opset", [13, 20])
def test_no_constant_needs_the_device_of_the_network(opset: int, shuffling: Path, tmp_path: Path) -> None:
    """Reading a size from a tensor on the meta device fails, as combining it with a CPU tensor does on a GPU."""
    path = shuffling
    if opset == 13:
        path = export_by_tracing(torchvision_network("shufflenet_v2_x0_5"), tmp_path / "teacher.onnx", opset=13)
    module = load_teacher(path).module.to("meta")
    assert module(torch.empty(5, *SIZE, device="meta")).shape == (5, 10)


def test_fixed_shapes_compile_as_one_graph(shuffling: Path) -> None:
    teacher = load_teacher(shuffling)
    compiled = torch.compile(teacher.module, backend="eager", fullgraph=True, dynamic=False)
    images = torch.rand(4, *SIZE)
    torch.testing.assert_close(compiled(images), teacher.logits(images))


@pytest.mark.parametrize(
    ("last", "name"), [(nn.Softmax(1), "Softmax"), (nn.LogSoftmax(1), "LogSoftmax"), (nn.Sigmoid(), "Sigmoid")]
)
def test_last_probabilities_are_cut(last: nn.Module, name: str, tmp_path: Path) -> None:
    path = export(small_network(last), tmp_path / "teacher.onnx")
    teacher = load_teacher(path)
    assert teacher.contract.task == ("multilabel" if name == "Sigmoid" else "classification")
    assert load_teacher(path, fields=ContractFields(task="classification")).contract.task == "classification"
    images = torch.rand(4, *SIZE)
    torch.testing.assert_close(teacher.logits(images), small_network()(images))
    assert any(f"the last {name} was taken off" in note for note in teacher.notes)


def test_fixed_batch_of_one_becomes_dynamic(tmp_path: Path) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_network()

        def forward(self, images: Tensor) -> Tensor:
            maps = self.network[:3](images)
            return self.network[4](maps.reshape(maps.shape[0], -1))  # type: ignore[no-any-return]

    network = Viewing()
    teacher = load_teacher(export(network, tmp_path / "teacher.onnx", dynamic=False))
    images = torch.rand(6, *SIZE)
    torch.testing.assert_close(teacher.logits(images), network(images))
    assert any("batch of 1 was made dynamic" in note for note in teacher.notes)


def graph_of_batch(batch: int) -> onnx.ModelProto:
    """A graph that joins each batch with a constant of the same number of images."""
    weights: dict[str, Any] = {"row": np.ones((batch, 1, 32, 32), np.float32)}
    nodes = [
        helper.make_node("Concat", ["images", "row"], ["four"], axis=1),
        *classifier(weights, images="four", channels=4),
    ]
    return graph_of(nodes, weights, inputs=[("images", TensorProto.FLOAT, [batch, 3, 32, 32])])


def test_batch_of_one_that_the_graph_fixes_is_mapped(tmp_path: Path) -> None:
    path = saved(graph_of_batch(1), tmp_path)
    teacher = load_teacher(path)
    images = torch.rand(5, *SIZE, requires_grad=True)
    logits = teacher.logits(images)
    torch.testing.assert_close(logits.detach(), torch.cat([of_runtime(path, one) for one in images.detach().split(1)]))
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    assert bool(gradient.flatten(1).any(1).all())
    assert any("mapped over the images" in note for note in teacher.notes)


def test_other_batch_that_the_graph_fixes_is_refused(tmp_path: Path) -> None:
    path = saved(graph_of_batch(4), tmp_path)
    with pytest.raises(DfadcError, match="does not run on a batch of 12") as caught:
        read_teacher_file(path)
    assert "dynamic" in caught.value.hint


def test_channels_last_and_uint8_images(tmp_path: Path) -> None:
    """A vendor's classifier: uint8 pixels (N, H, W, C), preprocessing inside, softmax at the end."""
    weights: dict[str, Any] = {"shift": np.float32(127.5), "scale": np.float32(0.01)}
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["floats", "shift"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["images"], perm=[0, 3, 1, 2]),
        *classifier(weights),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    model = graph_of(
        nodes,
        weights,
        inputs=[("pixels", TensorProto.UINT8, ["N", 24, 32, 3])],
        outputs=[("probabilities", TensorProto.FLOAT, None)],
    )
    path = saved(model, tmp_path)
    teacher = load_teacher(path)
    assert teacher.contract.input_size == (3, 24, 32)
    assert (teacher.contract.mean, teacher.contract.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    pixels = torch.randint(0, 256, (5, 24, 32, 3), dtype=torch.uint8)
    logits = teacher.logits(pixels.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(logits.softmax(1), of_runtime(path, pixels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("opset", [7, 11, 13, 22])
def test_batch_norms_that_survive_are_found_with_statistics(opset: int, tmp_path: Path) -> None:
    weights: dict[str, Any] = {
        "scale": np.array([1, 2, 3], np.float32),
        "shift": np.zeros(3, np.float32),
        "mean": np.array([0.1, 0.2, 0.3], np.float32),
        "variance": np.array([1, 2, 4], np.float32),
    }
    norm = helper.make_node("BatchNormalization", ["images", "scale", "shift", "mean", "variance"], ["normal"])
    path = saved(graph_of([norm, *classifier(weights, images="normal")], weights, opset=opset), tmp_path)
    teacher = load_teacher(path)
    (layer,) = teacher.norm_layers
    assert (layer.has_statistics, layer.num_channels) == (True, 3)
    assert teacher.batch_norms[0].running_var.tolist() == [1, 2, 4]  # type: ignore[operator]
    seen: list[Tensor] = []
    teacher.batch_norms[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(2, *SIZE)
    torch.testing.assert_close(teacher.logits(images), of_runtime(path, images))
    torch.testing.assert_close(seen[0], images)


def test_size_that_the_graph_leaves_open_is_asked_for(tmp_path: Path) -> None:
    weights: dict[str, Any] = {}
    model = graph_of(classifier(weights), weights, inputs=[("images", TensorProto.FLOAT, ["N", 3, "H", "W"])])
    path = saved(model, tmp_path)
    with pytest.raises(DfadcError, match="input size of the teacher is unknown"):
        load_teacher(path)
    assert load_teacher(path, fields=ContractFields(input_size=(3, 20, 24))).contract.input_size == (3, 20, 24)


class TwoOutputs(nn.Module):
    def __init__(self, *, features: bool) -> None:
        super().__init__()
        self.network, self.other, self.features = small_network(), nn.Linear(32, 3), features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.network[:3](images)
        other = maps if self.features else self.other(maps.flatten(1))
        return self.network[3:](maps), other


def test_one_of_several_outputs(tmp_path: Path) -> None:
    network = TwoOutputs(features=False)
    path = export(network, tmp_path / "teacher.onnx", output_names=["breed", "age"])
    assert "breed" in run_command("inspect", path).out
    assert "finite logits of 3 classes" in run_command("inspect", path, "--output", "age").out
    with pytest.raises(DfadcError, match=r"several outputs that may be logits: breed \(2, 5\), age \(2, 3\)") as caught:
        load_teacher(path)
    assert "--output breed | --output age" in caught.value.hint
    images = torch.rand(3, *SIZE)
    for name, index in (("breed", 0), ("1", 1)):
        teacher = load_teacher(path, output=name)
        torch.testing.assert_close(teacher.logits(images), network(images)[index])
    with pytest.raises(DfadcError, match="no output 'colour'"):
        load_teacher(path, output="colour")
    network = TwoOutputs(features=True)
    teacher = load_teacher(export(network, tmp_path / "teacher.onnx", output_names=["y", "maps"]))
    torch.testing.assert_close(teacher.logits(images), network(images)[0])
    assert any("y is taken" in note for note in teacher.notes)


def test_a_last_argmax_is_cut(tmp_path: Path) -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images).argmax(1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Classes()
    teacher = load_teacher(export(network, tmp_path / "teacher.onnx"))
    assert (teacher.contract.task, teacher.contract.num_classes) == ("segmentation", 4)
    images = torch.rand(2, *SIZE)
    torch.testing.assert_close(teacher.logits(images).argmax(1), network(images))


def _refused_graphs() -> dict[str, tuple[onnx.ModelProto, str]]:
    weights: dict[str, Any] = {}
    nodes = classifier(weights)
    two = [("images", TensorProto.FLOAT, ["N", 3, 32, 32]), ("mask", TensorProto.FLOAT, ["N", 1])]
    branch = helper.make_graph([], "branch", [], [])
    chosen = helper.make_node("If", ["flag"], ["other"], then_branch=branch, else_branch=branch)
    foreign = helper.make_node("Sharpen", ["images"], ["sharp"], domain="com.vendor")
    unknown = graph_of([foreign, *classifier(weights, images="sharp")], weights)
    unknown.opset_import.append(helper.make_opsetid("com.vendor", 1))
    quantised = [
        helper.make_node("QuantizeLinear", ["images", "step", "zero"], ["integers"]),
        helper.make_node("MaxPool", ["integers"], ["largest"], kernel_shape=[2, 2]),
        helper.make_node("DequantizeLinear", ["largest", "step", "zero"], ["rounded"]),
        *classifier(weights, images="rounded"),
    ]
    integers = [
        helper.make_node("DynamicQuantizeLinear", ["images"], ["integers", "step", "zero"]),
        helper.make_node("DequantizeLinear", ["integers", "step", "zero"], ["rounded"]),
        *classifier(weights, images="rounded"),
    ]
    grid = {"step": np.float32(0.01), "zero": np.uint8(0)}
    return {
        "control flow": (graph_of([*nodes, chosen], {**weights, "flag": np.array(True)}), "operator If"),
        "several inputs": (graph_of(nodes, weights, inputs=two), r"2 inputs \(images, mask\)"),
        "text": (graph_of(nodes, weights, inputs=[("tokens", TensorProto.FLOAT, ["N", 8])]), "tokens of 2 axes"),
        "integers": (graph_of(nodes, weights, inputs=[("images", TensorProto.INT32, ["N", 3, 9, 9])]), "type INT32"),
        "operator": (unknown, "Sharpen"),
        "quantised": (graph_of(quantised, {**weights, **grid}), "QuantizeLinear integers without DequantizeLinear"),
        "computes with integers": (graph_of(integers, weights), "DynamicQuantizeLinear"),
    }


@pytest.mark.parametrize("case", list(_refused_graphs()))
def test_what_cannot_teach_is_named(case: str, tmp_path: Path) -> None:
    model, message = _refused_graphs()[case]
    with pytest.raises(DfadcError, match=message) as caught:
        read_teacher_file(saved(model, tmp_path))
    assert caught.value.hint
    assert "teacher.onnx" in caught.value.message


def test_wrong_conversion_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: dict[str, Any] = {}
    path = saved(graph_of(classifier(weights), weights), tmp_path)
    convert = onnx2fx.convert

    def convert_wrongly(model: onnx.ModelProto) -> nn.Module:
        module: nn.Module = convert(model)
        module.get_buffer("kernel").mul_(1.001)
        return module

    monkeypatch.setattr(onnx2fx, "convert", convert_wrongly)
    with pytest.raises(DfadcError, match=r"other outputs after its conversion: .*e-0[34] of their range"):
        read_teacher_file(path)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = export(small_network(), tmp_path / "teacher.onnx", external_data=True)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert load_teacher(path).contract.num_classes == 5
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(DfadcError, match=r"weights\.bin") as caught:
        read_teacher_file(path)
    assert "copy weights.bin beside it" in caught.value.hint


def test_missing_converter_is_a_missing_requirement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: dict[str, Any] = {}
    path = saved(graph_of(classifier(weights), weights), tmp_path)
    monkeypatch.setitem(sys.modules, "onnx2fx", None)
    with pytest.raises(RequirementMissing) as caught:
        load_teacher(path)
    assert caught.value.hint == "pip install 'dfadc[onnx-teacher]'"
    assert caught.value.exit_code == 4
    report = inspect_teacher(path)
    assert report.problem is None
    assert report.safety.startswith("safe")


def test_distilling_an_onnx_teacher_by_the_command(digits_teacher: Path, tmp_path: Path) -> None:
    path = export(load_teacher(digits_teacher).module, tmp_path / "teacher.onnx", size=(1, 8, 8))
    quick = settings({**QUICK_RECIPE, "steps": 2})
    run = tmp_path / "run"
    outcome = run_command("distill", path, "--student", "compact_resnet_4", *quick, "--export", "onnx", "--out", run)
    assert outcome.code in (0, 3), outcome.err
    assert (run / "artifacts" / "student.onnx").is_file()
