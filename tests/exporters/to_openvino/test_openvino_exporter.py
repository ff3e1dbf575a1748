from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import files_of

from dfadc.errors import DfadcError, ExportFailed, RequirementMissing, StorageFailed
from dfadc.verification.agreement import compare
from exporters.exporter import BuildSettings, ExportRequest, ExportResult
from exporters.sessions import openvino_core
from exporters.sessions.open import open_session
from exporters.sessions.openvino_session import OpenVinoSession
from exporters.sessions.session import Session
from exporters.to_onnx.exporter import DerivedOnnxExporter
from exporters.to_openvino.exporter import OpenVinoExporter

pytest.importorskip("openvino", reason="pip install openvino")

CPU_INFO = Path("/proc/cpuinfo")


def convert(source: Path, folder: Path, text: str) -> ExportResult:
    request = ExportRequest.parse(text)
    return OpenVinoExporter().export(source, folder / request.file_name, request, BuildSettings())


@pytest.mark.parametrize(("text", "tolerance"), [("openvino", 1e-4), ("openvino:fp16", 0.02)])
def test_a_real_student_runs_on_the_cpu(
    text: str, tolerance: float, student_onnx: Path, images: np.ndarray, student_logits: np.ndarray, tmp_path: Path
) -> None:
    result = convert(student_onnx, tmp_path, text)
    assert [path.suffix for path in (result.path, *result.extra_files)] == [".xml", ".bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [result.extra_files[0].name, result.path.name]
    ir = result.path.read_text()
    assert str(tmp_path) not in ir
    assert "torchvision:mobilenet_v2" in ir
    with open_session(result.path, threads=1, batch_size=32) as session:
        assert isinstance(session, OpenVinoSession)
        assert isinstance(session, Session)
        assert session.device == "CPU"
        logits = session.run(images)
    assert logits.dtype == np.float32
    assert np.abs(logits - student_logits).max() <= tolerance * np.ptp(student_logits)


def test_fp16_weights_take_half_the_room(student_onnx: Path, tmp_path: Path) -> None:
    single, half = (convert(student_onnx, tmp_path, text) for text in ("openvino", "openvino:fp16"))
    sizes = [result.extra_files[0].stat().st_size for result in (single, half)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)


def test_another_precision_is_refused(student_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match="not quantised, and int8 was requested"):
        convert(student_onnx, tmp_path, "openvino:int8")
    half = tmp_path / "half.onnx"
    DerivedOnnxExporter().export(student_onnx, half, ExportRequest.parse("onnx:fp16"), BuildSettings())
    with pytest.raises(DfadcError, match="fp16 weights, and fp32 was requested"):
        convert(half, tmp_path, "openvino")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPU_INFO.is_file(), reason="asks Linux about an x86 CPU")
def test_int8_saturates_where_there_is_no_vnni() -> None:
    flags = next(line for line in CPU_INFO.read_text().splitlines() if line.startswith("flags")).split()
    assert openvino_core.saturates() == (not {"avx512_vnni", "avx_vnni"}.intersection(flags))


@pytest.mark.parametrize("text", ["openvino", "openvino:int8"])
def test_a_cpu_that_saturates_computes_int8_in_fp32(
    text: str, student_onnx: Path, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is quantised. That the property keeps such a CPU from saturating is not shown on one that has VNNI."""
    source = student_onnx
    if text == "openvino:int8":
        source = tmp_path / "student.int8.onnx"
        settings = BuildSettings(calibration=images, calibrator="minmax", keep_fp32=())
        DerivedOnnxExporter().export(student_onnx, source, ExportRequest.parse("onnx:int8"), settings)
    path = convert(source, tmp_path, text).path
    with open_session(source, threads=1) as onnx_runtime:
        reference = onnx_runtime.run(images)
    for wrong in (False, True):
        monkeypatch.setattr(openvino_core, "saturates", lambda wrong=wrong: wrong)
        for session in (OpenVinoSession(path, threads=1), OpenVinoSession(source, threads=1)):
            with session:
                assert session.remark == (openvino_core.REMARK if wrong and "int8" in text else "")
                facts = [n.get_rt_info() for n in session._compiled.get_runtime_model().get_ops()]  # noqa: SLF001
                types = {
                    str(f["runtimePrecision"].astype(str)) for f in facts if f["layerType"].astype(str) == "Convolution"
                }
                assert types
                assert types <= ({"u8", "i8"} if "int8" in text and not wrong else {"f32"})
                assert compare(session.run(images), reference).sqnr_db > 10  # 53 layers of random weights


def test_damaged_ir_is_a_clear_error(student_onnx: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = convert(student_onnx, tmp_path, "openvino")
    text = result.path.read_text()
    for content in ("", "hello", text[: len(text) // 2]):
        result.path.write_text(content)
        with pytest.raises(DfadcError, match="student"):
            OpenVinoSession(result.path)
    result.path.write_text(text)
    result.extra_files[0].unlink()
    with pytest.raises(DfadcError, match="an OpenVINO model is two files"):
        OpenVinoSession(result.path)
    with pytest.raises(DfadcError, match="cannot read"):
        OpenVinoSession(tmp_path / "missing.xml")
    with pytest.raises(DfadcError, match="not an artifact"):
        open_session(tmp_path / "student.pt")
    assert capfd.readouterr().err == ""


def test_a_missing_device_is_not_replaced(student_onnx: Path, tmp_path: Path) -> None:
    result = convert(student_onnx, tmp_path, "openvino")
    with pytest.raises(RequirementMissing, match="no NPU here"):
        OpenVinoSession(result.path, device_name="NPU")


def test_an_unwritable_folder_is_a_storage_error(student_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed):
        convert(student_onnx, tmp_path / "file", "openvino")


def test_openvino_needs_no_torch(student_onnx: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from pathlib import Path; from exporters.exporter import *\n"
        "from exporters.registry import get_exporter; from exporters.sessions.open import open_session\n"
        f"source, target = Path({str(student_onnx)!r}), Path({str(tmp_path / 'student.openvino.xml')!r})\n"
        "get_exporter('openvino').export(source, target, ExportRequest('openvino'), BuildSettings())\n"
        "print(open_session(target, threads=1).run(np.zeros((2, 3, 32, 32), np.float32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.stdout.strip(), done.stderr) == ("(2, 10)", "")


@pytest.mark.parametrize("suffix", [".xml", ".bin"])
def test_both_files_are_replaced_or_none(
    suffix: str, student_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = convert(student_onnx, tmp_path, "openvino")
    before, rename = files_of(tmp_path), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == result.path.name.replace(".xml", suffix) and Path(target).parent == tmp_path:
            monkeypatch.undo()
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    request = ExportRequest.parse("openvino:fp16")
    with pytest.raises(StorageFailed, match="No space left"):
        OpenVinoExporter().export(student_onnx, result.path, request, BuildSettings())
    assert files_of(tmp_path) == before


def test_a_signal_after_sessions_that_ended_in_any_order_is_heard(student_onnx: Path) -> None:
    """Each CPU plugin of OpenVINO has a signal stack; a stack that is gone makes a signal a segmentation fault."""
    program = (
        "import faulthandler, os, signal, sys\n"
        "from pathlib import Path\n"
        "from exporters.sessions.openvino_session import OpenVinoSession\n"
        "faulthandler.enable()\n"
        "first, second = (OpenVinoSession(Path(sys.argv[1]), threads=1) for _ in range(2))\n"
        "del first\n"
        "del second\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heard'))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run(  # noqa: S603 -- our own interpreter
        [sys.executable, "-c", program, str(student_onnx)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
