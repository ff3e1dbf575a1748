from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from dfadc.errors import DfadcError, ExportFailed
from dfadc.verification.agreement import compare
from exporters.exporter import BuildSettings, ExportRequest, ExportResult
from exporters.registry import get_exporter
from exporters.sessions.open import open_session
from exporters.to_onnx.describe import describe_onnx
from exporters.to_onnx.exporter import DerivedOnnxExporter
from exporters.to_onnx.file import load_onnx
from exporters.to_onnx.fp32 import export_onnx
from exporters.to_onnx.int8.presets import check_preset
from exporters.to_onnx.int8.quantise import quantise
from exporters.to_onnx.int8.sensitivity import distance
from exporters.to_onnx.int8.sensitivity import logits_of as logits_of_model

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.contract import ImageContract

PORTABLE = ExportRequest.parse("onnx:int8")
ORT_CPU = ExportRequest.parse("onnx:int8:ort-cpu")


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6()]


@pytest.fixture(scope="module")
def shallow_onnx(contract: ImageContract, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three convolutions: untrained MobileNets are too chaotic to say anything about quantisation."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = nn.Sequential(
            *convolution(3, 32), *convolution(32, 64), *convolution(64, 64), nn.Flatten(), nn.Linear(1024, 10)
        )
        with torch.no_grad():
            network.train()(torch.from_numpy(images))
            network.train()(torch.from_numpy(images))
    path = tmp_path_factory.mktemp("shallow") / "student.onnx"
    export_onnx(network, path, contract=contract, metadata={})
    return path


def build(source: Path, target: Path, request: ExportRequest, images: np.ndarray, **settings: object) -> ExportResult:
    return DerivedOnnxExporter().export(source, target, request, BuildSettings(calibration=images, **settings))  # type: ignore[arg-type]


def logits_of(path: Path, images: np.ndarray) -> np.ndarray:
    with open_session(path, threads=1) as session:
        return session.run(images)


@pytest.mark.parametrize("request_", [PORTABLE, ORT_CPU], ids=str)
def test_int8_agrees_with_fp32(
    request_: ExportRequest, shallow_onnx: Path, images: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = build(shallow_onnx, tmp_path / request_.file_name, request_, images)
    found = compare(logits_of(result.path, images), logits_of(shallow_onnx, images))
    assert found.agreement >= 0.9
    assert found.sqnr_db >= 20
    assert result.effective_precision == "int8"
    assert any("24 held-out images" in note for note in result.notes)
    assert 3 * result.size_bytes < shallow_onnx.stat().st_size
    description = describe_onnx(result.path)
    assert description["metadata"]["dfadc.precision"] == "int8"
    assert {key for key in description["metadata"] if not key.startswith("dfadc.")} == set()
    assert capfd.readouterr() == ("", "")


def test_the_same_images_give_the_same_bytes(shallow_onnx: Path, images: np.ndarray, tmp_path: Path) -> None:
    first, second = (build(shallow_onnx, tmp_path / name, PORTABLE, images) for name in ("a.onnx", "b.onnx"))
    assert first.sha256 == second.sha256


def test_portable_is_portable_and_the_check_finds_what_is_not(shallow_onnx: Path, images: np.ndarray) -> None:
    source = load_onnx(shallow_onnx)
    portable = quantise(source, images, preset="portable", calibrator="minmax").model
    check_preset(portable, "portable")
    faster = quantise(source, images, preset="ort-cpu", calibrator="minmax").model
    with pytest.raises(ExportFailed, match="TensorRT does not parse"):
        check_preset(faster, "portable")
    shifted = onnx.ModelProto()
    shifted.CopyFrom(portable)
    zero_point = next(tensor for tensor in shifted.graph.initializer if tensor.name.endswith("_zero_point"))
    zero_point.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(zero_point) + np.int8(1), zero_point.name))
    with pytest.raises(ExportFailed, match="zero point other than 0"):
        check_preset(shifted, "portable")
    with pytest.raises(ExportFailed, match="nothing was quantised"):
        check_preset(source, "portable")


def test_auto_takes_the_calibrator_nearest_to_fp32(shallow_onnx: Path, images: np.ndarray) -> None:
    source = load_onnx(shallow_onnx)
    spiked = images.copy()
    spiked[0, 0, 0, 0] = 3000.0  # min-max stretches its range over one freak pixel
    results = {name: quantise(source, spiked, calibrator=name) for name in ("minmax", "percentile", "entropy", "auto")}
    divergence = {name: results[name].held_out.kl for name in ("minmax", "percentile", "entropy")}
    assert results["auto"].calibrator == min(divergence, key=lambda name: divergence[name]) != "minmax"
    assert results["auto"].held_out.n == 24


def test_calibrators_are_not_told_apart_by_agreement() -> None:
    """One image more or fewer of a few hundred is chance; how far the answers have moved is not."""
    reference = np.random.default_rng(0).normal(size=(256, 10))
    near = reference + 0.01 * np.random.default_rng(1).normal(size=reference.shape)
    near[0] = -near[0]
    far = 0.5 * reference  # every class right, every probability wrong
    assert compare(far, reference).k > compare(near, reference).k
    assert distance(compare(near, reference)) < distance(compare(far, reference))


@pytest.mark.parametrize("preset", ["portable", "ort-cpu"])
@pytest.mark.parametrize("embed_softmax", [False, True])
def test_answers_are_not_rounded(
    preset: str, embed_softmax: bool, contract: ImageContract, images: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "student.onnx"
    network = nn.Sequential(*convolution(3, 16), nn.Flatten(), nn.Linear(4096, 10)).eval()
    export_onnx(network, path, contract=contract, metadata={}, embed_softmax=embed_softmax)
    model = quantise(load_onnx(path), images, preset=preset, calibrator="minmax").model
    producer = {name: node for node in model.graph.node for name in node.output}
    (output,) = model.graph.output
    last = producer[output.name]
    if embed_softmax:
        assert last.op_type == "Softmax"
        last = producer[last.input[0]]
    assert last.op_type == "Gemm"
    assert {producer[name].op_type for name in last.input[:2]} == {"DequantizeLinear"}
    onnx.checker.check_model(model, full_check=True)
    answers = logits_of_model(model, images)
    assert len(np.unique(answers)) > 256


def test_kept_nodes_stay_in_float(shallow_onnx: Path, images: np.ndarray, tmp_path: Path) -> None:
    target = tmp_path / "student.int8.onnx"
    result = build(shallow_onnx, target, PORTABLE, images, keep_fp32=("0/Conv",), calibrator="minmax")
    assert result.effective_precision == "int8, 1 nodes in fp32"
    weights = {tensor.name: tensor.data_type for tensor in onnx.load(target).graph.initializer}
    assert weights["0.weight"] == TensorProto.FLOAT
    assert "3.weight" not in weights
    with pytest.raises(DfadcError, match="no node '0/Cnov'"):
        build(shallow_onnx, target, PORTABLE, images, keep_fp32=("0/Cnov",))


class Sharing(nn.Module):
    """Two convolutions with one bias, the second used twice, and two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second.bias = self.first.bias
        self.third, self.fourth = nn.Linear(512, 10), nn.Linear(512, 10)
        self.fourth.weight = self.third.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.second(torch.relu(self.second(torch.relu(self.first(images))))))
        flat = features.flatten(1)
        logits: torch.Tensor = self.third(flat) + self.fourth(flat * flat)
        return logits


@pytest.fixture(scope="module")
def sharing_onnx(contract: ImageContract, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Sharing().eval()
        with torch.no_grad():
            for weight in (network.first.weight, network.second.weight, network.third.weight):
                weight.normal_(0, 2 / weight[0].numel() ** 0.5)
    path = tmp_path_factory.mktemp("sharing") / "student.onnx"
    export_onnx(network, path, contract=contract, metadata={})
    return path


@pytest.mark.parametrize("preset", ["portable", "ort-cpu"])
def test_layers_that_share_a_constant(preset: str, sharing_onnx: Path, images: np.ndarray) -> None:
    """Each has its own in INT8, loads, and may go back to fp32 alone; ONNX Runtime refused the file before."""
    source = load_onnx(sharing_onnx)
    before = source.SerializeToString()
    weights = {tensor.name for tensor in source.graph.initializer}
    layers = [node for node in source.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len([name for node in layers for name in node.input if name in weights]) > len(weights)
    found = quantise(source, images, preset=preset, calibrator="minmax")
    assert source.SerializeToString() == before
    assert found.held_out.sqnr_db >= 20
    dequantised = [node.input[0] for node in found.model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(set(dequantised)) == len(dequantised)
    for layer in layers:
        alone = quantise(source, images, preset=preset, calibrator="minmax", keep_fp32=[layer.name])
        onnx.checker.check_model(alone.model, full_check=True)
        assert alone.held_out.sqnr_db >= 20


def test_pools_that_calibrate_nothing_are_refused(shallow_onnx: Path, images: np.ndarray, tmp_path: Path) -> None:
    broken = images.copy()
    broken[3, 0, 0, 0] = np.nan
    pools = {
        "0 calibration images are too few": images[:0],
        "3 calibration images are too few": images[:3],
        "into class": np.repeat(images[:1], 20, axis=0),
        "NaN or infinite": broken,
    }
    target = tmp_path / "student.int8.onnx"
    for message, pool in pools.items():
        with pytest.raises(DfadcError, match=message) as caught:
            build(shallow_onnx, target, PORTABLE, pool)
        assert caught.value.exit_code == 5
    with pytest.raises(DfadcError, match="needs calibration images"):
        DerivedOnnxExporter().export(shallow_onnx, target, PORTABLE, BuildSettings())
    with pytest.raises(DfadcError, match="unknown calibrator 'minmx'") as caught:
        build(shallow_onnx, target, PORTABLE, images, calibrator="minmx")
    assert "did you mean minmax" in caught.value.hint
    assert not target.exists()


def test_int8_cannot_be_quantised_again(shallow_onnx: Path, images: np.ndarray, tmp_path: Path) -> None:
    first = build(shallow_onnx, tmp_path / "first.onnx", PORTABLE, images, calibrator="minmax")
    with pytest.raises(DfadcError, match="not an fp32 graph"):
        build(first.path, tmp_path / "second.onnx", PORTABLE, images)


#: Without VNNI, OpenVINO's INT8 kernels add pairs of products in 16 bits and saturate: 12 and 18 dB on a Zen 3.
HAS_VNNI = any(torch.cpu.get_capabilities().get(flag) for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


@pytest.mark.skipif(platform.machine() == "x86_64" and not HAS_VNNI, reason="OpenVINO's INT8 saturates on this CPU")
@pytest.mark.parametrize("preset", ["portable", "ort-cpu"])
def test_openvino_runs_what_onnx_runtime_runs(
    preset: str, shallow_onnx: Path, images: np.ndarray, tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="pip install openvino")
    request = ExportRequest.parse(f"openvino:int8:{preset}")
    assert request.source is not None
    source = build(shallow_onnx, tmp_path / request.source.file_name, request.source, images, calibrator="minmax")
    target = tmp_path / request.file_name
    result = get_exporter("openvino").export(source.path, target, request, BuildSettings())
    assert result.effective_precision == "int8"
    assert result.extra_files[0].stat().st_size < 0.4 * shallow_onnx.stat().st_size
    assert compare(logits_of(target, images), logits_of(source.path, images)).sqnr_db >= 30


def test_a_real_mobilenet_becomes_an_int8_engine(student_onnx: Path, images: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    source = build(student_onnx, tmp_path / PORTABLE.file_name, PORTABLE, images, calibrator="minmax")
    request = ExportRequest.parse("tensorrt-rtx:int8")
    settings = BuildSettings(gpus=("sm86", "sm89", "sm120"))
    result = get_exporter("tensorrt-rtx").export(source.path, tmp_path / request.file_name, request, settings)
    assert result.effective_precision == "int8"
    assert result.parent_sha256 == source.sha256
    assert any("experimental" in note for note in result.notes)


def test_int8_weights_are_the_fp32_weights_but_for_rounding(
    contract: ImageContract, images: np.ndarray, tmp_path: Path
) -> None:
    """Also of channels a hundred times as narrow as their neighbours: widened, they would meet the clip of ReLU6."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, depthwise = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 16, 3, groups=16)
        answer = nn.Linear(16, 10)
        network = nn.Sequential(
            first, nn.ReLU6(), depthwise, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), answer
        ).eval()
        with torch.no_grad():
            first.weight *= torch.logspace(-2, 0, 16).reshape(-1, 1, 1, 1)
            answer.bias.sub_(network(torch.from_numpy(images)).mean(0))  # Else every image is of one class.
    source = load_onnx(export_onnx(network, tmp_path / "student.onnx", contract=contract, metadata={}).path)
    model = quantise(source, images, calibrator="minmax").model
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.graph.initializer}
    quantised = [name for name in weights if f"{name}_quantized" in tensors and weights[name].ndim == 4]
    assert len(quantised) == 2
    for name in quantised:
        scale = tensors[f"{name}_scale"].reshape(-1, 1, 1, 1)
        assert (np.abs(tensors[f"{name}_quantized"] * scale - weights[name]) <= 0.51 * scale).all(), name
