"""Every precision is really built for every GPU that is promised, and what Turing cannot have says why."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from command_line import files_of, run_command

from dfadc.pipeline.export import export_student
from dfadc.run_folder import RunFolder
from exporters.exporter import BatchProfile, BuildSettings, ExportRequest, ExportResult
from exporters.manifest import Manifest, check_unchanged
from exporters.sessions.tensorrt_session import read_sidecar
from exporters.to_onnx.exporter import DerivedOnnxExporter
from exporters.to_tensorrt.exporter import tensorrt_rtx

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")

GPUS = ("sm86", "sm89", "sm120")
#: What the weighted layers of each engine compute in.
CENSUS = {"fp32": {"float"}, "fp16": {"half"}, "int8": {"float", "quantize"}}


@pytest.fixture(scope="module")
def typed(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A distilled student's typed ONNX by precision; INT8 with the preset ``portable``."""
    run = RunFolder(tmp_path_factory.mktemp("typed") / "run")
    shutil.copytree(finished_run.path, run.path)
    export_student(run, ["onnx:fp16", "onnx:int8:portable"])
    return {precision: run.artifacts / ExportRequest.parse(f"onnx:{precision}").file_name for precision in CENSUS}


def build(precision: str, gpus: tuple[str, ...], source: Path, folder: Path) -> ExportResult:
    request = ExportRequest.parse(f"tensorrt-rtx:{precision}")
    settings = BuildSettings(gpus=gpus, batch=BatchProfile(1, 4, 16))
    return tensorrt_rtx().export(source, folder / request.file_name, request, settings)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("precision", CENSUS)
def test_an_engine_of_each_precision_for_each_gpu(
    precision: str, gpu: str, typed: dict[str, Path], tmp_path: Path
) -> None:
    result = build(precision, (gpu,), typed[precision], tmp_path)
    assert result.path.read_bytes()[:4] == b"vtrt"
    assert result.targets == (gpu,)
    assert result.effective_precision.startswith(precision)
    sidecar = read_sidecar(result.path)  # compares its bytes too
    assert sidecar["gpus"] == [gpu]
    assert sidecar["precision"] == precision
    assert set(sidecar["layer_dtypes"]) == CENSUS[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_engine_of_a_mobilenet_for_all_of_them(precision: str, student_onnx: Path, tmp_path: Path) -> None:
    """Its INT8 is built where INT8 is tested."""
    source = student_onnx
    if precision == "fp16":
        source = tmp_path / "student.fp16.onnx"
        DerivedOnnxExporter().export(student_onnx, source, ExportRequest.parse("onnx:fp16"), BuildSettings())
    result = build(precision, GPUS, source, tmp_path)
    assert result.targets == GPUS
    assert read_sidecar(result.path)["gpus"] == list(GPUS)


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_turing_has_fp16_and_the_reason_why_not_fp32(run_copy: RunFolder) -> None:
    done = run_command("export", run_copy.path, "-e", "tensorrt-rtx:fp16", "--gpu", "sm75", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["student.fp16.rtx.engine"]["targets"] == ["sm75"]
    before = files_of(run_copy.path)
    refused = run_command("export", run_copy.path, "-e", "tensorrt-rtx", "--gpu", "sm75")
    assert refused.code == 5
    assert "for sm75" in refused.errors[0]
    assert "FP32 GEMM is not supported" in refused.errors[0]
    assert refused.hints == ["hint: Turing (sm75) engines must be fp16"]
    assert files_of(run_copy.path) == before


def test_an_unknown_gpu_is_refused_before_anything_is_made(run_copy: RunFolder) -> None:
    before = files_of(run_copy.path)
    outcome = run_command("export", run_copy.path, "-e", "tensorrt-rtx:int8", "--gpu", "sm86,sm87")
    assert outcome.code == 2
    assert "unknown GPU 'sm87'" in outcome.errors[0]
    assert "sm89" in outcome.hints[0]
    assert files_of(run_copy.path) == before


def test_an_engine_for_another_gpu_replaces_the_first_and_says_so(run_copy: RunFolder) -> None:
    """One engine can serve several GPUs, so there is one file, and nobody loses one without hearing of it."""
    first = run_command("export", run_copy.path, "-e", "tensorrt-rtx:fp16", "--gpu", "sm86")
    assert "(0." in first.err
    assert "for sm86)" in first.err
    assert "replaces" not in first.err
    second = run_command("export", run_copy.path, "-e", "tensorrt-rtx:fp16", "--gpu", "sm89,sm120")
    assert second.code == 0, second.err
    assert "replaces the engine for sm86; one engine can serve several" in second.err
    record = check_unchanged(run_copy.path).find("artifacts/student.fp16.rtx.engine")
    assert record is not None
    assert record.targets == ("sm89", "sm120")
    again = run_command("export", run_copy.path, "-e", "tensorrt-rtx:fp16", "--gpu", "sm89,sm120,sm89")
    assert "replaces" not in again.err


def test_an_engine_is_made_of_the_source_that_is_there(run_copy: RunFolder) -> None:
    """Made anew, the fp16 ONNX would lose the node that was kept in fp32 and the normalisation inside it."""
    asked = ("-e", "onnx:fp16", "--keep-fp32", "network.classifier/Gemm", "--embed-normalisation")
    chosen = run_command("export", run_copy.path, *asked)
    assert chosen.code == 0, chosen.err
    before = files_of(run_copy.artifacts)
    outcome = run_command("export", run_copy.path, "-e", "tensorrt-rtx:fp16", "--json")
    assert outcome.code == 0, outcome.err
    made = json.loads(outcome.out)
    assert set(made) == {"student.fp16.rtx.engine"}
    assert made["student.fp16.rtx.engine"]["precision"] == "fp16, 1 of 11 weighted layers in fp32"
    after = files_of(run_copy.artifacts)
    assert {name: after[name] for name in before} == before
    sidecar = read_sidecar(run_copy.artifacts / "student.fp16.rtx.engine")
    assert sidecar["metadata"]["dfadc.input"].startswith("pixels")
    (run_copy.artifacts / "student.fp16.onnx").unlink()
    remade = run_command("export", run_copy.path, "-e", "tensorrt-rtx:fp16", "--json")
    assert set(json.loads(remade.out)) == {"student.fp16.onnx", "student.fp16.rtx.engine"}
    record = Manifest.read(run_copy.path).find("artifacts/student.fp16.onnx")
    assert record is not None
    assert record.effective_precision == "fp16"


def test_an_edited_source_is_neither_used_nor_replaced(run_copy: RunFolder) -> None:
    path = run_copy.artifacts / "student.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    before = files_of(run_copy.path)
    outcome = run_command("export", run_copy.path, "-e", "tensorrt-rtx:fp16")
    assert outcome.code == 2
    assert "student.onnx is not the file that was exported" in outcome.errors[0]
    assert "onnx:fp32 again" in outcome.hints[0]
    assert files_of(run_copy.path) == before
