"""What an artifact is, read off its bytes: the same facts for ONNX, OpenVINO and engines."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from command_line import run_command
from onnx import numpy_helper

from dfadc.errors import DfadcError
from exporters.describe import artifact_metadata, describe_artifact
from exporters.exporter import BatchProfile, BuildSettings, ExportRequest
from exporters.registry import get_exporter

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def fp16_onnx(student_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("onnx:fp16", student_onnx, tmp_path_factory.mktemp("describe"))


def build(export: str, source: Path, folder: Path, settings: BuildSettings | None = None) -> Path:
    request = ExportRequest.parse(export)
    target = folder / request.file_name
    return get_exporter(request.name).export(source, target, request, settings or BuildSettings()).path


def test_an_onnx_shows_its_ends_dtypes_and_operators(fp16_onnx: Path) -> None:
    found = describe_artifact(fp16_onnx)
    assert found["kind"] == "ONNX"
    assert found["inputs"] == [{"name": "images", "dtype": "float", "shape": ["batch", 3, 32, 32]}]
    assert found["outputs"] == [{"name": "logits", "dtype": "float", "shape": ["batch", 10]}]
    model = onnx.load(fp16_onnx)
    assert found["opset"] == 20
    assert found["operators"]["Conv"] == 22
    assert sum(found["operators"].values()) == len(model.graph.node)
    assert sum(found["tensor_dtypes"].values()) == sum(len(node.output) for node in model.graph.node)
    assert found["tensor_dtypes"]["float"] == 1  # the logits, cast back
    assert found["tensor_dtypes"].keys() == {"float", "float16"}
    sizes = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert found["num_weights"] == sum(array.size for array in sizes)
    assert found["weight_dtypes"]["float16"] == sum(array.size for array in sizes if array.dtype == np.float16)
    assert found["metadata"]["dfadc.precision"] == "fp16"


def test_an_openvino_ir_shows_the_same(student_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install openvino")
    path = build("openvino:fp16", student_onnx, tmp_path)
    found = describe_artifact(path)
    source = describe_artifact(student_onnx)
    assert found["inputs"] == source["inputs"]
    assert found["outputs"][0]["shape"] == source["outputs"][0]["shape"]
    assert found["weight_dtypes"]["float16"] >= 0.9 * source["weight_dtypes"]["float"]
    assert 2 * found["weight_dtypes"]["float16"] == pytest.approx(path.with_suffix(".bin").stat().st_size, rel=0.02)
    assert "Convolution" in found["operators"]
    assert found["metadata"]["dfadc.precision"] == "fp16"
    assert found["metadata"]["dfadc.contract"] == source["metadata"]["dfadc.contract"]
    assert found["size_bytes"] == path.stat().st_size + path.with_suffix(".bin").stat().st_size
    path.write_text(path.read_text()[:2000])
    with pytest.raises(DfadcError, match="damaged OpenVINO IR"):
        describe_artifact(path)


def test_an_engine_is_what_its_sidecar_says(fp16_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    settings = BuildSettings(batch=BatchProfile(2, 4, 16), gpus=("sm86", "sm89"))
    path = build("tensorrt-rtx:fp16", fp16_onnx, tmp_path, settings)
    found = describe_artifact(path)
    assert found["inputs"] == [{"name": "images", "dtype": "float", "shape": ["2 to 16", 3, 32, 32]}]
    assert found["outputs"] == [{"name": "logits", "dtype": "float", "shape": ["2 to 16", 10]}]
    assert found["gpus"] == ["sm86", "sm89"]
    assert found["effective_precision"] == "fp16"
    assert found["size_bytes"] == path.stat().st_size
    shown = run_command("inspect", path).out
    for said in ("images: float 2 to 16 x 3 x 32 x 32", "sm86, sm89", "half 23", "tensorrt_rtx 1."):
        assert said in shown
    assert found["tensor_dtypes"]["half"] == 23
    assert artifact_metadata(path)["dfadc.precision"] == "fp16"
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(DfadcError, match="is not the engine that was built"):
        describe_artifact(path)


def test_the_command_shows_an_artifact(fp16_onnx: Path, tmp_path: Path) -> None:
    outcome = run_command("inspect", fp16_onnx)
    assert outcome.code == 0, outcome.err
    found = describe_artifact(fp16_onnx)
    for said in (
        "images: float batch x 3 x 32 x 32",
        "logits: float batch x 10",
        "Conv 22",
        f"{found['num_weights']:,}",
    ):
        assert said in outcome.out
    for key, value in found["metadata"].items():
        assert key in outcome.out
        assert value in outcome.out
    assert json.loads(run_command("inspect", fp16_onnx, "--json").out) == found
    other = tmp_path / "student.onnx"
    shutil.copyfile(__file__, other)
    damaged = run_command("inspect", other)
    assert damaged.code == 2
    assert str(other) in damaged.errors[0]
    with pytest.raises(DfadcError, match="is not an artifact"):
        describe_artifact(tmp_path / "student.tflite")
