from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import TYPE_CHECKING, cast

import numpy as np
import onnx
import pytest
from crashing_model import transpose_before_matmul
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dfadc.errors import DfadcError
from exporters.exporter import BuildSettings, ExportRequest, ExportResult
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.to_onnx.describe import describe_onnx
from exporters.to_onnx.exporter import DerivedOnnxExporter
from exporters.to_onnx.file import load_onnx
from exporters.to_onnx.fp16 import convert_to_fp16
from exporters.to_onnx.ranges import measure_activations

if TYPE_CHECKING:
    from pathlib import Path

FP16 = ExportRequest.parse("onnx:fp16")


def two_convolutions(gain: float, weight: float = 1.0) -> onnx.ModelProto:
    """images (N, 2, 4, 4) -> "up" (times ``gain``) -> Relu -> "down" (over ``gain``) -> pool -> logits (N, 3)."""
    generator = np.random.default_rng(0)
    kernel = generator.uniform(0.5, 1, (3, 2, 1, 1)).astype(np.float32)
    mix = generator.uniform(-1, 1, (3, 3, 1, 1)).astype(np.float32)
    scale = np.array([weight], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "kernel"], ["loud"], name="up"),
            helper.make_node("Relu", ["loud"], ["rectified"], name="relu"),
            helper.make_node("Conv", ["rectified", "mix"], ["quiet"], name="down"),
            helper.make_node("GlobalAveragePool", ["quiet"], ["pooled"], name="pool"),
            helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
            helper.make_node("Div", ["flat", "scale"], ["logits"], name="scale"),
        ],
        "two_convolutions",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 2, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(kernel * np.float32(gain), "kernel"),
            numpy_helper.from_array(mix / np.float32(gain), "mix"),
            numpy_helper.from_array(scale, "scale"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def in_real_fp16(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """ONNX Runtime computes fp16 in fp32 on a CPU; the reference evaluator rounds every tensor."""
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = cast("list[np.ndarray]", ReferenceEvaluator(model).run(None, {"images": images}))
    return outputs[0]


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(1).uniform(-2, 2, (5, 2, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def half(student_onnx: Path, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    target = tmp_path_factory.mktemp("fp16") / FP16.file_name
    return DerivedOnnxExporter().export(student_onnx, target, FP16, BuildSettings(calibration=images))


def test_a_real_student_in_fp16(
    half: ExportResult, exported: ExportResult, images: np.ndarray, student_logits: np.ndarray
) -> None:
    description = describe_onnx(half.path)
    assert description["weight_dtypes"].get("float", 0) == 0
    assert description["operators"]["Cast"] == 2
    assert description["inputs"][0]["dtype"] == description["outputs"][0]["dtype"] == "float"
    assert description["metadata"]["dfadc.precision"] == "fp16"
    assert description["metadata"]["dfadc.parent_sha256"] == exported.sha256 == half.parent_sha256
    assert description["metadata"]["dfadc.architecture"] == "torchvision:mobilenet_v2"
    assert half.effective_precision == "fp16"
    assert half.sha256 == hashlib.sha256(half.path.read_bytes()).hexdigest()
    assert half.size_bytes < 0.6 * exported.size_bytes
    with OnnxRuntimeSession(half.path, threads=1) as session:
        logits = session.run(images)
    assert (logits.argmax(1) == student_logits.argmax(1)).mean() >= 0.97
    assert np.abs(logits - student_logits).max() <= 0.02 * np.ptp(student_logits)


def test_the_same_source_gives_the_same_bytes(half: ExportResult, student_onnx: Path, tmp_path: Path) -> None:
    again = DerivedOnnxExporter().export(student_onnx, tmp_path / "again.onnx", FP16, BuildSettings())
    assert again.sha256 == half.sha256


def test_overflowing_nodes_stay_in_fp32(noise: np.ndarray) -> None:
    source = two_convolutions(gain=60000.0)
    expected = in_real_fp16(source, noise)
    blind = convert_to_fp16(source)
    assert not np.isfinite(in_real_fp16(blind.model, noise)).all()
    seeing = convert_to_fp16(source, images=noise)
    assert seeing.fp32_nodes == ("down", "relu", "up")
    np.testing.assert_allclose(in_real_fp16(seeing.model, noise), expected, atol=0.01)
    casts = [node for node in seeing.model.graph.node if node.op_type == "Cast"]
    assert len(casts) <= 4
    onnx.checker.check_model(seeing.model, full_check=True)


def test_an_overflowing_output_leaves_in_fp32(noise: np.ndarray) -> None:
    source = two_convolutions(gain=1.0, weight=1e-7)
    converted = convert_to_fp16(source, images=noise)
    assert converted.fp32_nodes == ("scale",)
    assert [value.name for value in converted.model.graph.output] == ["logits"]
    onnx.checker.check_model(converted.model, full_check=True)
    expected = in_real_fp16(source, noise)
    np.testing.assert_allclose(in_real_fp16(converted.model, noise), expected, atol=0.01 * np.abs(expected).max())


def test_weights_beyond_fp16_stay_in_fp32_without_images(noise: np.ndarray) -> None:
    source = two_convolutions(gain=1e5)
    converted = convert_to_fp16(source)
    assert "up" in converted.fp32_nodes
    assert convert_to_fp16(source, images=noise).fp32_nodes == ("down", "relu", "up")


def test_the_caller_can_keep_nodes(noise: np.ndarray) -> None:
    source = two_convolutions(gain=1.0)
    before = source.SerializeToString()
    converted = convert_to_fp16(source, keep_fp32=["down"])
    assert converted.fp32_nodes == ("down",)
    mix = next(tensor for tensor in converted.model.graph.initializer if tensor.name == "mix")
    assert mix.data_type == TensorProto.FLOAT
    assert source.SerializeToString() == before
    with pytest.raises(DfadcError, match="no node 'dwon'"):
        convert_to_fp16(source, keep_fp32=["dwon"])


def test_what_crashes_onnx_runtime_stays_in_fp32() -> None:
    """A Transpose after a Cast and before a MatMul with a constant, as in torch's attention."""
    source = transpose_before_matmul()
    converted = convert_to_fp16(source)
    assert converted.fp32_nodes == ("transpose",)
    images = np.random.default_rng(2).normal(size=(3, 2, 4, 4)).astype(np.float32)
    with OnnxRuntimeSession(converted.model.SerializeToString(), threads=1) as session:
        logits = session.run(images)
    np.testing.assert_allclose(logits, in_real_fp16(source, images), atol=0.01)
    weight = next(tensor for tensor in converted.model.graph.initializer if tensor.name == "weight")
    assert weight.data_type == TensorProto.FLOAT16


def sum_times_counts(dtype: int) -> onnx.ModelProto:
    """images (N, 2, 4, 4), summed, times N, N + 1 and N + 3000, which pass through ``dtype`` -> logits (N, 3)."""
    rows = np.array([[0, 1, 3000]], np.int64)
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"], name="flatten"),
        helper.make_node("ReduceSum", ["flat", "axis"], ["total"], name="sum"),
        helper.make_node("Shape", ["images"], ["size"], name="shape", start=0, end=1),
        helper.make_node("Add", ["rows", "size"], ["counted"], name="count"),
        helper.make_node("Cast", ["counted"], ["mask"], name="mask", to=dtype),
        helper.make_node("Cast", ["mask"], ["number"], name="number", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["total", "number"], ["logits"], name="scale"),
    ]
    graph = helper.make_graph(
        nodes,
        "sum_times_counts",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 2, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.array([1]), "axis"), numpy_helper.from_array(rows, "rows")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("dtype", [TensorProto.BOOL, TensorProto.INT64, TensorProto.INT32])
def test_a_cast_of_what_is_no_float_stays(dtype: int) -> None:
    """Before an fp32 node, bool -> fp16 -> fp32 is no round trip; and 3005 is no number of fp16."""
    source = sum_times_counts(dtype)
    converted = convert_to_fp16(source, keep_fp32=["scale"])
    onnx.checker.check_model(converted.model, full_check=True)
    images = np.random.default_rng(2).uniform(0.5, 1, size=(5, 2, 4, 4)).astype(np.float32)
    with OnnxRuntimeSession(converted.model.SerializeToString(), threads=1) as session:
        logits = session.run(images)
    np.testing.assert_allclose(logits, in_real_fp16(source, images), rtol=2e-3)
    third = 1.0 if dtype == TensorProto.BOOL else 3005 / 6
    np.testing.assert_allclose(logits[:, 2] / logits[:, 1], third, rtol=1e-5)


def test_activation_ranges_are_the_real_ones(noise: np.ndarray) -> None:
    source = two_convolutions(gain=100.0)
    kernel = numpy_helper.to_array(source.graph.initializer[0])[:, :, 0, 0]
    loud = np.einsum("kc,nchw->nkhw", kernel, noise)
    assert np.abs(loud).max() > 1.01 * loud.max()  # or the two nodes could not be told apart
    quiet = np.maximum(loud, 0).transpose(0, 2, 3, 1) @ numpy_helper.to_array(source.graph.initializer[1])[:, :, 0, 0].T
    found = measure_activations(source, [noise[:2], noise[2:]])
    assert found.num_images == len(noise)
    assert found.peaks["up"] == found.peaks["relu"] == pytest.approx(np.abs(loud).max(), rel=1e-5)  # it reads it
    assert found.peaks["down"] == pytest.approx(max(loud.max(), np.abs(quiet).max()), rel=1e-5)
    assert found.peaks["pool"] == pytest.approx(np.abs(quiet).max(), rel=1e-5)


def test_wrong_sources_are_refused(half: ExportResult, student_onnx: Path, tmp_path: Path) -> None:
    exporter = DerivedOnnxExporter()
    with pytest.raises(DfadcError, match="not an fp32 graph"):
        exporter.export(half.path, tmp_path / "a.onnx", FP16, BuildSettings())
    with pytest.raises(DfadcError, match="exported from the torch student"):
        exporter.export(student_onnx, tmp_path / "a.onnx", ExportRequest("onnx"), BuildSettings())
    old = two_convolutions(1.0)
    old.opset_import[0].version = 17
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(DfadcError, match="opset 17, not 20"):
        exporter.export(tmp_path / "old.onnx", tmp_path / "a.onnx", FP16, BuildSettings())
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no network"), (b"\x80\x02nonsense", "not an ONNX file"), (None, "cannot read")],
)
def test_damaged_sources_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DfadcError, match=message):
        load_onnx(path)


def test_derived_artifacts_need_no_torch(student_onnx: Path, half: ExportResult, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from exporters.exporter import *; from exporters.registry import get_exporter\n"
        f"source, target = Path({str(student_onnx)!r}), Path({str(tmp_path / 'half.onnx')!r})\n"
        "request = ExportRequest.parse('onnx:fp16')\n"
        "print(get_exporter('onnx').export(source, target, request, BuildSettings()).sha256)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.stdout.strip(), done.stderr) == (half.sha256, "")
