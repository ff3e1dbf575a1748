from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from dfadc.errors import DfadcError, RequirementMissing
from exporters.sessions.onnx_runtime import OnnxRuntimeSession, check_release
from exporters.sessions.session import Session
from exporters.sessions.torch_session import TorchSession
from exporters.to_onnx.int8.quantise import quantise

if TYPE_CHECKING:
    from pathlib import Path


def test_torch_and_onnx_sessions_agree_whatever_the_batch(
    student: nn.Module, student_onnx: Path, images: np.ndarray, student_logits: np.ndarray
) -> None:
    scale = np.ptp(student_logits)
    for batch_size in (7, 500):
        with (
            TorchSession(student, batch_size=batch_size) as reference,
            OnnxRuntimeSession(student_onnx, threads=1, batch_size=batch_size) as candidate,
        ):
            assert isinstance(reference, Session)
            assert isinstance(candidate, Session)
            assert (reference.device, candidate.device) == ("cpu", "CPUExecutionProvider")
            for session in (reference, candidate):
                logits = session.run(images)
                assert logits.dtype == np.float32
                assert logits.shape == student_logits.shape
                assert np.abs(logits - student_logits).max() <= 1e-4 * scale


def test_a_fixed_batch_is_filled_up_and_cut(
    student_onnx: Path, tmp_path: Path, images: np.ndarray, student_logits: np.ndarray
) -> None:
    model = onnx.load(student_onnx)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 40
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    with OnnxRuntimeSession(path, threads=1, batch_size=8) as session:
        assert session.batch_size == 40
        assert np.abs(session.run(images) - student_logits).max() <= 1e-4 * np.ptp(student_logits)


def test_torch_session_leaves_a_training_module_alone(images: np.ndarray) -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(4))
    module(torch.from_numpy(images[:2]))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with TorchSession(module) as session:
        session.run(images)
    assert all(part.training for part in module.modules())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 3, 32, 32), np.float64, "float64"),
        ((2, 3, 32, 32), np.uint8, "uint8"),
        ((3, 32, 32), np.float32, "not (N, C, H, W)"),
        ((0, 3, 32, 32), np.float32, "N of at least 1"),
        ((2, 1, 32, 32), np.float32, "images are 1x32x32, the network takes 3x32x32"),
    ],
)
def test_wrong_images_are_refused(shape: tuple[int, ...], dtype: type, message: str, student_onnx: Path) -> None:
    with OnnxRuntimeSession(student_onnx, threads=1) as session, pytest.raises(DfadcError) as caught:
        session.run(np.zeros(shape, dtype))
    assert message in caught.value.message


def test_a_damaged_file_is_a_clear_error(student_onnx: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = student_onnx.read_bytes()
    for name, content in {"half": data[: len(data) // 2], "text": b"hello", "empty": b""}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(DfadcError, match=name) as caught:
            OnnxRuntimeSession(path)
        assert caught.value.exit_code == 2
    with pytest.raises(DfadcError, match="does not exist"):
        OnnxRuntimeSession(tmp_path / "missing.onnx")
    assert capfd.readouterr().err == ""


def test_a_missing_provider_is_not_replaced_in_silence(student_onnx: Path) -> None:
    with pytest.raises(RequirementMissing, match="DmlExecutionProvider") as caught:
        OnnxRuntimeSession(student_onnx, provider="DmlExecutionProvider")
    assert "CPUExecutionProvider" in caught.value.hint


def test_an_onnx_runs_without_torch(student_onnx: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from pathlib import Path; from exporters.sessions.onnx_runtime import OnnxRuntimeSession\n"
        f"session = OnnxRuntimeSession(Path({str(student_onnx)!r}), threads=1)\n"
        "print(session.run(np.zeros((2, 3, 32, 32), np.float32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.stdout.strip(), done.stderr) == ("(2, 10)", "")


@pytest.mark.parametrize("version", ["1.16.3", "1.9.0", "0.5.0"])
def test_an_onnx_runtime_that_is_too_old_is_named(version: str) -> None:
    with pytest.raises(RequirementMissing, match=f"student.onnx needs ONNX Runtime 1.17 or newer, and {version} is"):
        check_release(version, "student.onnx")


@pytest.mark.parametrize("version", ["1.17.0", "1.23.2", "1.18.0.dev20240101", "2.0"])
def test_an_onnx_runtime_that_is_new_enough_is_taken(version: str) -> None:
    check_release(version, "student.onnx")


def test_onnx_runtime_prints_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """It writes coloured text from C++ where an operator fails; our error holds the reason."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [7, 13])
    ends = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, 8, 8])]
    outs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, None])]
    nodes = [helper.make_node("Reshape", ["images", "shape"], ["logits"])]
    graph = helper.make_graph(nodes, "reshapes", ends, outs, [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    images = np.zeros((8, 1, 8, 8), np.float32)
    with (
        OnnxRuntimeSession(model.SerializeToString(), threads=1) as session,
        pytest.raises(DfadcError, match="cannot be reshaped"),
    ):
        session.run(images)
    with pytest.raises(DfadcError, match="cannot be reshaped"):
        quantise(model, images)
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_the_cuda_provider_computes_what_the_student_does(
    student_onnx: Path, images: np.ndarray, student_logits: np.ndarray
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("pip install onnxruntime-gpu: this build of ONNX Runtime has no CUDA provider")
    with OnnxRuntimeSession(student_onnx, provider="CUDAExecutionProvider", batch_size=7) as session:
        assert session.device == "CUDAExecutionProvider"
        logits = session.run(images)
    assert np.abs(logits - student_logits).max() <= 0.01 * np.ptp(student_logits)
