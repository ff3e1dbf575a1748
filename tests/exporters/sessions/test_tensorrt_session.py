from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dfadc.errors import DfadcError, RequirementMissing
from exporters.exporter import BuildSettings, ExportRequest
from exporters.sessions.open import open_session
from exporters.sessions.tensorrt_session import open_engine, read_sidecar, sidecar_path
from exporters.to_tensorrt.exporter import cuda_gpu, tensorrt_rtx

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")


@pytest.fixture
def engine(student_onnx: Path, tmp_path: Path) -> Path:
    request = ExportRequest.parse("tensorrt-rtx")
    return tensorrt_rtx().export(student_onnx, tmp_path / request.file_name, request, BuildSettings()).path


@pytest.mark.skipif(cuda_gpu() is not None, reason="there is a GPU here")
def test_without_a_gpu_an_engine_cannot_run_and_says_why(engine: Path) -> None:
    with pytest.raises(RequirementMissing, match="runs on an NVIDIA GPU, and there is none here"):
        open_session(engine)


def test_changed_engines_are_never_loaded(engine: Path) -> None:
    assert read_sidecar(engine)["file"] == "student.rtx.engine"
    engine.write_bytes(engine.read_bytes() + b"!")
    with pytest.raises(DfadcError, match="is not the engine that was built"):
        open_engine(engine)


def test_an_engine_of_another_release_is_refused(engine: Path) -> None:
    facts = json.loads(sidecar_path(engine).read_text())
    facts["versions"]["tensorrt_rtx"] = "1.2.0"
    sidecar_path(engine).write_text(json.dumps(facts))
    with pytest.raises(RequirementMissing, match=r"was built by tensorrt-rtx 1\.2\.0") as caught:
        open_engine(engine)
    assert "tensorrt_rtx==1.2.0" in caught.value.hint


@pytest.mark.parametrize(("content", "message"), [("{", "is damaged"), ("[]", "is damaged"), ("{}", "is damaged")])
def test_damaged_sidecars_are_refused(engine: Path, content: str, message: str) -> None:
    sidecar_path(engine).write_text(content)
    with pytest.raises(DfadcError, match=message):
        open_engine(engine)
    sidecar_path(engine).unlink()
    with pytest.raises(DfadcError, match="cannot read") as caught:
        open_engine(engine)
    assert "needs its sidecar" in caught.value.hint


@pytest.mark.gpu
def test_an_engine_computes_what_the_student_does(engine: Path, images: np.ndarray, student_logits: np.ndarray) -> None:
    with open_session(engine, batch_size=7) as session:
        logits = session.run(images)
    assert np.abs(logits - student_logits).max() <= 0.01 * np.ptp(student_logits)
