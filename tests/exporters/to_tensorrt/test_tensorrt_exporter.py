from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import onnx
import pytest
from onnx import TensorProto, helper

from dfadc.errors import DfadcError, ExportFailed, RequirementMissing, StorageFailed
from exporters.exporter import BatchProfile, BuildSettings, ExportRequest, ExportResult, Precision
from exporters.sessions.tensorrt_session import TENSORRT, TENSORRT_RTX, Backend, sidecar_path
from exporters.to_onnx.exporter import DerivedOnnxExporter
from exporters.to_tensorrt.api import TensorRtApi
from exporters.to_tensorrt.exporter import TensorRtExporter, effective_precision, tensorrt_rtx

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")

FP32 = ExportRequest.parse("tensorrt-rtx:fp32")
FP16 = ExportRequest.parse("tensorrt-rtx:fp16")


@pytest.fixture(scope="module")
def half_onnx(student_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("typed") / "student.fp16.onnx"
    DerivedOnnxExporter().export(student_onnx, path, ExportRequest.parse("onnx:fp16"), BuildSettings())
    return path


def build(source: Path, folder: Path, request: ExportRequest, settings: BuildSettings | None = None) -> ExportResult:
    return tensorrt_rtx().export(source, folder / request.file_name, request, settings or BuildSettings())


def test_a_real_fp16_engine_with_its_sidecar(half_onnx: Path, tmp_path: Path) -> None:
    phases: list[tuple[str, int, int]] = []
    settings = BuildSettings(
        batch=BatchProfile(1, 8, 32),
        gpus=("SM86", "sm89"),
        workspace_bytes=1 << 28,
        on_progress=lambda phase, done, total: phases.append((phase, done, total)),
    )
    result = build(half_onnx, tmp_path, FP16, settings)
    engine = result.path.read_bytes()
    assert engine[:4] == b"vtrt"
    assert result.sha256 == hashlib.sha256(engine).hexdigest()
    assert result.targets == ("sm86", "sm89")
    assert result.effective_precision == "fp16"
    assert any(done == total for _, done, total in phases)
    sidecar = json.loads(sidecar_path(result.path).read_text())
    assert sidecar["sha256"] == result.sha256
    assert sidecar["parent_sha256"] == hashlib.sha256(half_onnx.read_bytes()).hexdigest()
    assert sidecar["batch"] == [1, 8, 32]
    assert sidecar["gpus"] == ["sm86", "sm89"]
    assert sidecar["layer_dtypes"] == {"half": 23}
    assert sidecar["versions"].keys() == {"tensorrt_rtx"}
    assert sidecar["metadata"]["dfadc.architecture"] == "torchvision:mobilenet_v2"
    assert build(half_onnx, tmp_path / "again", FP16, settings).sha256 == result.sha256


def test_a_portable_fp32_engine(student_onnx: Path, tmp_path: Path) -> None:
    result = build(student_onnx, tmp_path, FP32)
    assert result.path.name == "student.rtx.engine"
    assert result.targets == ()
    assert "built for Ampere and newer RTX GPUs" in result.notes


def test_turing_takes_fp16_and_says_so_of_fp32(student_onnx: Path, half_onnx: Path, tmp_path: Path) -> None:
    settings = BuildSettings(gpus=("sm75",))
    assert build(half_onnx, tmp_path, FP16, settings).size_bytes > 0
    with pytest.raises(ExportFailed, match=r"cannot build the engine for sm75: .+") as caught:
        build(student_onnx, tmp_path, FP32, settings)
    assert "gave no reason" not in caught.value.message
    assert "must be fp16" in caught.value.hint
    assert not (tmp_path / FP32.file_name).exists()


@pytest.mark.parametrize(("request_", "typed"), [(FP16, "fp32"), (FP32, "fp16")])
def test_a_graph_of_another_precision_is_refused(
    request_: ExportRequest, typed: str, student_onnx: Path, half_onnx: Path, tmp_path: Path
) -> None:
    source = student_onnx if typed == "fp32" else half_onnx
    with pytest.raises(ExportFailed, match=f"the graph is not {request_.precision}"):
        build(source, tmp_path, request_)
    assert list(tmp_path.iterdir()) == []


def test_census_rules() -> None:
    assert effective_precision({"float": 1, "half": 9}, Precision.FP16) == "fp16, 1 of 10 weighted layers in fp32"
    assert effective_precision({"float": 3, "quantize": 7}, Precision.INT8) == "int8"
    for census, requested in (
        ({"float": 3}, Precision.INT8),
        ({"half": 3, "quantize": 1}, Precision.FP16),
        ({"bf16": 3, "half": 1}, Precision.FP16),
        ({}, Precision.FP16),
    ):
        with pytest.raises(ExportFailed, match="the graph is not"):
            effective_precision(census, requested)


def test_an_unsupported_operator_is_named(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Det", ["images"], ["logits"], name="the_determinant")],
        "unsupported",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a.onnx")
    with pytest.raises(ExportFailed, match="operator Det"):
        build(tmp_path / "a.onnx", tmp_path, FP32)


def test_an_unknown_gpu_names_the_known(half_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="unknown GPU 'sm87'") as caught:
        build(half_onnx, tmp_path, FP16, BuildSettings(gpus=("sm87",)))
    assert "sm86" in caught.value.hint


def test_ctrl_c_cancels_the_build_and_leaves_nothing(half_onnx: Path, tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(half_onnx, tmp_path, FP16, BuildSettings(on_progress=interrupt))
    assert list(tmp_path.iterdir()) == []


def build_interrupted(seconds: float, source: Path, folder: Path) -> None:
    """A build that somebody outside sends Ctrl-C."""
    code = f"import os, signal, time; time.sleep({seconds}); os.kill({os.getpid()}, signal.SIGINT)"
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as sender:  # noqa: S603 -- our own interpreter
        build(source, folder, FP16)
        sender.wait()


def test_ctrl_c_is_heard_at_any_moment(half_onnx: Path, tmp_path: Path) -> None:
    """It arrives wherever the builder is, in its logger too, whose C++ frames swallow exceptions."""
    for moment in range(1, 8):
        with pytest.raises(KeyboardInterrupt):
            build_interrupted(0.04 * moment, half_onnx, tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_unwritable_target_leaves_nothing(half_onnx: Path, tmp_path: Path) -> None:
    target = tmp_path / "student.fp16.rtx.engine"
    sidecar_path(target).mkdir()
    with pytest.raises(StorageFailed):
        tensorrt_rtx().export(half_onnx, target, FP16, BuildSettings())
    assert [path.name for path in tmp_path.iterdir()] == [sidecar_path(target).name]


def test_a_missing_backend_says_how_to_get_it(half_onnx: Path, tmp_path: Path) -> None:
    missing = Backend("tensorrt", "tensorrt_that_nobody_has", "pip install it")
    exporter = TensorRtExporter(missing)
    capability = exporter.capability()
    assert (capability.can_build, capability.can_run, capability.install) == (False, False, "pip install it")
    with pytest.raises(RequirementMissing) as caught:
        exporter.export(half_onnx, tmp_path / "a.engine", ExportRequest.parse("tensorrt:fp16"), BuildSettings())
    assert caught.value.exit_code == 4
    assert caught.value.hint == "pip install it"


@pytest.mark.tensorrt
def test_full_tensorrt_builds_for_this_gpu(half_onnx: Path, tmp_path: Path) -> None:
    request = ExportRequest.parse("tensorrt:fp16")
    result = TensorRtExporter(TENSORRT).export(half_onnx, tmp_path / request.file_name, request, BuildSettings())
    assert result.effective_precision == "fp16"
    assert TensorRtApi(TENSORRT).gpu_names() == ()
    with pytest.raises(DfadcError, match="builds for the GPU of this machine"):
        TensorRtApi(TENSORRT).check_gpus(("sm86",))


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 0), False), ((7, 5), True), ((8, 6), True), ((9, 0), False), ((12, 0), True), ((13, 0), True)],
)
def test_rtx_engines_run_on_rtx_gpus_and_newer_ones(capability: tuple[int, int], *, runs: bool) -> None:
    assert TensorRtApi(TENSORRT_RTX).runs_on(capability) is runs
