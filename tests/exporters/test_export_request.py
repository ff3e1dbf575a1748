from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfadc.errors import DfadcError
from exporters.exporter import BatchProfile, Exporter, ExportRequest, Precision, with_sources
from exporters.registry import TARGETS, exporter_names, get_exporter, load


@pytest.mark.parametrize(
    ("text", "file_name", "source"),
    [
        ("onnx", "student.onnx", None),
        ("onnx:fp32", "student.onnx", None),
        ("onnx:fp16", "student.fp16.onnx", "onnx:fp32"),
        ("onnx:int8", "student.int8.onnx", "onnx:fp32"),
        ("onnx:int8:portable", "student.int8.onnx", "onnx:fp32"),
        ("onnx:int8:ort-cpu", "student.int8.ort-cpu.onnx", "onnx:fp32"),
        ("tensorrt-rtx", "student.rtx.engine", "onnx:fp32"),
        ("tensorrt-rtx:fp16", "student.fp16.rtx.engine", "onnx:fp16"),
        ("tensorrt:int8", "student.int8.trt.engine", "onnx:int8"),
        ("openvino:fp16", "student.fp16.openvino.xml", "onnx:fp32"),
        ("openvino:int8:ort-cpu", "student.int8.ort-cpu.openvino.xml", "onnx:int8:ort-cpu"),
    ],
)
def test_grammar_file_names_and_sources(text: str, file_name: str, source: str | None) -> None:
    request = ExportRequest.parse(text)
    assert request.file_name == file_name
    assert (None if request.source is None else str(request.source)) == source


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("onxn", "unknown export 'onxn'", "did you mean onnx"),
        ("tensorrt_rtx:fp16", "unknown export", "tensorrt-rtx"),
        ("onnx:fp8", "'fp8'", "valid: fp16, fp32, int8"),
        ("onnx:int8:portabel", "unknown int8 preset for onnx 'portabel'", "did you mean portable?"),
        ("tensorrt:int8:ort-cpu", "unknown int8 preset for tensorrt", "valid: portable"),
        ("onnx:fp16:portable", "only int8 has presets", "write onnx:fp16"),
        ("onnx:", "malformed", "NAME[:PRECISION[:PRESET]]"),
        ("onnx:int8:portable:x", "malformed", "NAME[:PRECISION[:PRESET]]"),
        ("", "malformed", "NAME"),
    ],
)
def test_bad_requests_name_what_is_valid(text: str, message: str, hint: str) -> None:
    with pytest.raises(DfadcError) as caught:
        ExportRequest.parse(text)
    assert caught.value.exit_code == 2
    assert message in caught.value.message
    assert hint in caught.value.hint


@given(st.sampled_from(sorted(TARGETS)), st.sampled_from(Precision))
def test_text_and_request_are_inverse(name: str, precision: Precision) -> None:
    request = ExportRequest(name, precision)
    assert ExportRequest.parse(str(request)) == request


def test_every_request_has_its_own_file() -> None:
    requests = {
        ExportRequest(name, precision, preset)
        for name, target in TARGETS.items()
        for precision in Precision
        for preset in (target.int8_presets if precision is Precision.INT8 else ("",))
    }
    assert len({request.file_name for request in requests}) == len(requests)


def test_sources_come_first_and_once() -> None:
    asked = [ExportRequest.parse(text) for text in ("tensorrt-rtx:int8", "onnx:fp16", "tensorrt-rtx:fp16", "onnx")]
    order = [str(request) for request in with_sources(asked)]
    assert order == ["onnx:fp32", "onnx:int8", "tensorrt-rtx:int8", "onnx:fp16", "tensorrt-rtx:fp16"]


def test_batch_profile_is_ordered() -> None:
    assert BatchProfile(1, 8, 32).highest == 32
    with pytest.raises(DfadcError, match="8,1,32"):
        BatchProfile(8, 1, 32)


@pytest.mark.parametrize("name", exporter_names())
def test_registry_returns_exporters_that_know_themselves(name: str) -> None:
    exporter = get_exporter(name)
    assert isinstance(exporter, Exporter)
    assert exporter.name == name
    capability = exporter.capability()
    assert capability.can_build or (capability.reason and capability.install)


@pytest.mark.parametrize("name", exporter_names())
def test_the_code_of_every_target_exists(name: str) -> None:
    target = TARGETS[name]
    assert all(callable(load(reference)) for reference in (target.exporter, target.session, target.describe))


def test_unknown_exporter_offers_the_nearest() -> None:
    with pytest.raises(DfadcError) as caught:
        get_exporter("openvion")
    assert "did you mean openvino?" in caught.value.hint


def test_torch_and_backends_are_not_imported_by_the_light_modules() -> None:
    heavy = "'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'openvino'"
    code = (
        "import sys, exporters.exporter, exporters.registry, exporters.sessions.onnx_runtime, exporters.manifest\n"
        f"sys.exit(', '.join(name for name in ({heavy}) if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")
