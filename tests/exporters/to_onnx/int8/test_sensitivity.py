"""INT8 that loses agreement: the responsible layer is named, and kept in fp32 on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from dfadc.verification.agreement import compare
from exporters.exporter import BuildSettings, ExportRequest, ExportResult
from exporters.sessions.open import open_session
from exporters.to_onnx.exporter import DerivedOnnxExporter
from exporters.to_onnx.file import load_onnx
from exporters.to_onnx.fp32 import export_onnx
from exporters.to_onnx.int8.calibration import CALIBRATORS, calibrate
from exporters.to_onnx.int8.presets import PRESETS, check_preset
from exporters.to_onnx.int8.quantise import quantise
from exporters.to_onnx.int8.quantiser import Quantiser
from exporters.to_onnx.int8.sensitivity import RANKING_PHASE, logits_of, rank_layers, recover

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.contract import ImageContract

INT8 = ExportRequest.parse("onnx:int8")
#: The layer that reads the outlier.
VICTIM = "3/Conv"


@pytest.fixture(scope="module")
def pool(images: np.ndarray) -> np.ndarray:
    """(160, 3, 32, 32): ten images, each sixteen times with a little noise on it."""
    noise = np.random.default_rng(0).normal(0, 0.05, (160, *images.shape[1:]))
    return (np.concatenate([images[:10]] * 16) + noise).astype(np.float32)


def export(path: Path, contract: ImageContract, pool: np.ndarray, *, outlier: float) -> Path:
    """Three convolutions that tell the ten images apart with a wide margin.

    One channel after the first is ``outlier`` times too large, and the second undoes it: the function is the same
    for any ``outlier``, but one INT8 scale cannot hold a huge channel and the others.
    """
    with torch.random.fork_rng():
        torch.manual_seed(5)
        body = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32, momentum=None), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64, momentum=None), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64, momentum=None), nn.ReLU()),
            nn.Flatten(),
        )
    with torch.no_grad():
        body.train()(torch.from_numpy(pool))
        features = body.eval()(torch.from_numpy(pool))
        ridge = features.T @ features + 10 * torch.eye(1024)
        head = nn.Linear(1024, 10, bias=False)
        head.weight.copy_(torch.linalg.solve(ridge, features.T @ torch.eye(10).repeat(16, 1)).T)
        for parameter in body[1].parameters():
            parameter[0] *= outlier
        next(body[3].parameters())[:, 0] /= outlier
    return export_onnx(nn.Sequential(*body, head).eval(), path, contract=contract, metadata={}).path


@pytest.fixture(scope="module")
def outlier_onnx(contract: ImageContract, pool: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("outlier") / "student.onnx", contract, pool, outlier=5000.0)


@pytest.fixture(scope="module")
def harmless(contract: ImageContract, pool: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return load_onnx(export(tmp_path_factory.mktemp("harmless") / "student.onnx", contract, pool, outlier=1.0))


def quantiser_of(source: onnx.ModelProto, pool: np.ndarray, preset: str = "portable") -> Quantiser:
    return Quantiser(source, calibrate(source, pool[::2], CALIBRATORS["minmax"]), PRESETS[preset])


def build(source: Path, target: Path, pool: np.ndarray, *keep_fp32: str) -> tuple[str, ...]:
    settings = BuildSettings(calibration=pool, calibrator="minmax", keep_fp32=keep_fp32)
    result = DerivedOnnxExporter().export(source, target, INT8, settings)
    return result.effective_precision, *result.notes


def test_layers_are_ranked_only_where_they_may_go_back(outlier_onnx: Path, pool: np.ndarray, tmp_path: Path) -> None:
    """The ranking takes up to minutes. It tells how far it is."""
    told: list[tuple[str, int, int]] = []

    def tell(phase: str, done: int, steps: int) -> None:
        told.append((phase, done, steps))

    def export_with(keep_fp32: tuple[str, ...] | None) -> ExportResult:
        told.clear()
        settings = BuildSettings(calibration=pool, calibrator="minmax", keep_fp32=keep_fp32, on_progress=tell)
        return DerivedOnnxExporter().export(outlier_onnx, tmp_path / INT8.file_name, INT8, settings)

    kept = export_with(())
    assert kept.effective_precision == "int8"
    assert told == [("calibrating INT8", 1, 1)]
    assert any("agreement fell; --keep-fp32 auto" in note for note in kept.notes)
    unsaid = export_with(None)
    assert unsaid.effective_precision == "int8, 1 nodes in fp32"
    assert [entry[1:] for entry in told if entry[0] == RANKING_PHASE] == [(count, 4) for count in range(1, 5)]
    (fell,) = [note for note in unsaid.notes if note.startswith("agreement fell")]
    assert f"hurts most: {VICTIM} (" in fell
    assert "--keep-fp32" not in fell


def test_auto_keeps_it_and_nothing_else(outlier_onnx: Path, pool: np.ndarray, tmp_path: Path) -> None:
    target = tmp_path / INT8.file_name
    precision, *notes = build(outlier_onnx, target, pool, "auto")
    assert precision == "int8, 1 nodes in fp32", notes
    assert f"kept in fp32: {VICTIM}" in notes
    assert any(note.startswith("agreement before layers were kept: ") for note in notes)
    model = load_onnx(target)
    check_preset(model, "portable")
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert weights["3.weight"] == TensorProto.FLOAT
    assert "3.weight_quantized" not in weights
    assert "6.weight" not in weights
    with open_session(target, threads=1) as int8, open_session(outlier_onnx, threads=1) as fp32:
        found = compare(int8.run(pool), fp32.run(pool))
    assert found.agreement >= 0.97
    assert found.sqnr_db >= 20


def test_a_harmless_network_keeps_nothing(harmless: onnx.ModelProto, pool: np.ndarray) -> None:
    found = quantise(harmless, pool, calibrator="minmax", keep_fp32=("auto",))
    assert (found.kept, found.worst, found.all_int8) == ((), (), None)


@pytest.mark.parametrize("preset", ["portable", "ort-cpu"])
def test_every_layer_in_fp32_is_the_fp32_graph(preset: str, harmless: onnx.ModelProto, pool: np.ndarray) -> None:
    """Its biases, too, and the ReLUs that ort-cpu had made the lower ends of ranges."""
    quantiser = quantiser_of(harmless, pool, preset)
    whole = quantiser.quantise(quantiser.layers)
    onnx.checker.check_model(whole, full_check=True)
    assert {node.op_type for node in whole.graph.node} == {node.op_type for node in harmless.graph.node}
    reference = logits_of(harmless, pool)
    np.testing.assert_allclose(logits_of(whole, pool), reference, atol=1e-5)
    assert compare(logits_of(quantiser.quantise(), pool), reference).sqnr_db < 60


@pytest.mark.parametrize("preset", ["portable", "ort-cpu"])
def test_a_layer_in_fp32_reads_unrounded_activations(preset: str, harmless: onnx.ModelProto, pool: np.ndarray) -> None:
    """ONNX Runtime gives an excluded node the rounded activation where the layer before it is quantised."""
    model = quantiser_of(harmless, pool, preset).quantise([VICTIM])
    producers = {name: node for node in model.graph.node for name in node.output}
    (victim,) = [node for node in model.graph.node if node.name == VICTIM]
    relu = producers[victim.input[0]]
    assert relu.op_type == "Relu"
    assert producers[relu.input[0]].op_type == "Conv"
    assert not producers.keys() & set(victim.input[1:])
    others = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm") and node is not victim]
    assert len(others) == 3
    assert all(producers[name].op_type == "DequantizeLinear" for node in others for name in node.input[:2])


@pytest.mark.parametrize("preset", ["portable", "ort-cpu"])
@pytest.mark.parametrize("layers", [(), (VICTIM,), ("0/Conv", "10/Gemm")])
def test_a_preview_computes_the_same_graph(
    layers: tuple[str, ...], preset: str, harmless: onnx.ModelProto, pool: np.ndarray
) -> None:
    quantiser = quantiser_of(harmless, pool, preset)
    assert set(layers) <= set(quantiser.layers)
    model = quantiser.quantise(layers)
    np.testing.assert_array_equal(logits_of(quantiser.preview(layers), pool), logits_of(model, pool))
    if layers:
        assert not np.array_equal(logits_of(quantiser.preview(), pool), logits_of(model, pool))


class Branches(nn.Module):
    """Two convolutions that read one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.stem(images))
        logits: torch.Tensor = self.head((self.left(features) + self.right(features)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("preset", ["portable", "ort-cpu"])
def test_only_the_layer_in_fp32_bypasses_rounding(
    preset: str, contract: ImageContract, pool: np.ndarray, tmp_path: Path
) -> None:
    path = export_onnx(Branches().eval(), tmp_path / "student.onnx", contract=contract, metadata={}).path
    model = quantiser_of(load_onnx(path), pool, preset).quantise(["left/Conv"])
    onnx.checker.check_model(model, full_check=True)
    producers = {name: node for node in model.graph.node for name in node.output}
    readers = {node.name: producers[node.input[0]].op_type for node in model.graph.node if node.op_type == "Conv"}
    assert readers["left/Conv"] == "Relu"
    assert readers["right/Conv"] == readers["stem/Conv"] == "DequantizeLinear"


@pytest.mark.parametrize("preset", ["portable", "ort-cpu"])
def test_each_layer_back_in_fp32_brings_the_answers_nearer(
    preset: str, harmless: onnx.ModelProto, pool: np.ndarray
) -> None:
    quantiser = quantiser_of(harmless, pool, preset)
    reference = logits_of(harmless, pool)
    before = compare(logits_of(quantiser.quantise(), pool), reference).sqnr_db
    ranking = rank_layers(quantiser, pool, reference)
    assert len(ranking) == 4
    assert all(layer.alone_in_fp32.sqnr_db > before - 1 for layer in ranking)
    assert [layer.alone_in_fp32.kl for layer in ranking] == sorted(layer.alone_in_fp32.kl for layer in ranking)


def test_no_more_than_a_few_layers_are_kept(
    harmless: onnx.ModelProto, pool: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no number of layers is enough, INT8 must not turn into fp32 one by one."""
    monkeypatch.setattr("exporters.to_onnx.int8.sensitivity.LEAST_AGREEMENT", 1.1)
    quantiser = quantiser_of(harmless, pool)
    reference = logits_of(harmless, pool)
    ranking = rank_layers(quantiser, pool, reference)
    assert len(ranking) == 4
    assert len(recover(quantiser, pool, reference, ranking=ranking).kept) == 2


def test_both_engines_take_a_graph_with_layers_in_fp32(outlier_onnx: Path, pool: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    from exporters.registry import get_exporter

    source = tmp_path / INT8.file_name
    build(outlier_onnx, source, pool, "auto")
    request = ExportRequest.parse("tensorrt-rtx:int8")
    result = get_exporter("tensorrt-rtx").export(source, tmp_path / request.file_name, request, BuildSettings())
    assert result.effective_precision == "int8"
