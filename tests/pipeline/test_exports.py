"""From a finished run to the files that devices take: what is made by default, what is asked for, what cannot be."""

from __future__ import annotations

import importlib.util
import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from command_line import run_command
from command_line import settings as settings_flags
from conftest import QUICK_RECIPE, QUICK_STUDENT
from onnx import numpy_helper

from dfadc.errors import DfadcError
from dfadc.pipeline.export import ExportObserver, export_student
from dfadc.pipeline.export_plan import DEFAULT_EXPORTS, plan_exports
from dfadc.run_folder import RunFolder
from exporters.exporter import BuildSettings, ExportRequest
from exporters.manifest import Manifest, check_unchanged
from exporters.registry import get_exporter
from exporters.to_onnx.describe import describe_onnx

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.pipeline.export_plan import Skipped

HERE = {export for export in DEFAULT_EXPORTS if get_exporter(ExportRequest.parse(export).name).capability().can_build}


@pytest.fixture(scope="module")
def default_run(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[Skipped]]:
    """A run with the default exports, and what of them was left out."""
    run = RunFolder(tmp_path_factory.mktemp("exports") / "run")
    shutil.copytree(finished_run.path, run.path)
    skipped: list[Skipped] = []
    export_student(run, observer=ExportObserver(on_skipped=skipped.append))
    return run, skipped


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def replace_pool(run: RunFolder, images: np.ndarray) -> None:
    np.savez(run.calibration, images=images)


def test_by_default_everything_is_made_whose_backend_is_here(default_run: tuple[RunFolder, list[Skipped]]) -> None:
    run, skipped = default_run
    made = {record.file.rpartition("/")[2] for record in check_unchanged(run.path).artifacts}
    assert made == {ExportRequest.parse(export).file_name for export in HERE}
    assert {"student.onnx", "student.fp16.onnx", "student.int8.onnx"} <= made
    assert {entry.export for entry in skipped} == set(DEFAULT_EXPORTS) - HERE
    assert all(entry.reason for entry in skipped)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="the full tensorrt is installed")
def test_what_is_missing_is_named_with_its_install_line(run_copy: RunFolder) -> None:
    outcome = run_command("export", run_copy.path)
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("not exported: ")]
    assert "tensorrt:fp16" in line
    assert "pip install tensorrt" in line
    assert "student.int8.onnx" in outcome.out
    asked = run_command("export", run_copy.path, "-e", "tensorrt:fp16")
    assert asked.code == 4
    assert "pip install tensorrt" in asked.hints[0]


def test_int8_is_calibrated_with_the_images_of_the_run(default_run: tuple[RunFolder, list[Skipped]]) -> None:
    run, _ = default_run
    with np.load(run.calibration) as archive:
        count = len(archive["images"])
    record = Manifest.read(run.path).find("artifacts/student.int8.onnx")
    assert record is not None
    assert any(f"{count - count // 2} images" in note for note in record.notes)


@pytest.mark.parametrize("pool", ["empty", "one image over and over"])
def test_a_pool_that_calibrates_nothing_is_said_by_default_and_an_error_when_asked(
    pool: str, run_copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dfadc.pipeline.export_plan.DEFAULT_EXPORTS", ("onnx:int8", "onnx:fp16")
    )  # engines take seconds
    with np.load(run_copy.calibration) as archive:
        images = archive["images"]
    replace_pool(run_copy, images[:0] if pool == "empty" else np.repeat(images[:1], 20, axis=0))
    skipped: list[Skipped] = []
    results = export_student(run_copy, observer=ExportObserver(on_skipped=skipped.append))
    assert "onnx:int8" in {entry.export for entry in skipped}
    assert "student.fp16.onnx" in {result.path.name for result in results}
    assert not (run_copy.artifacts / "student.int8.onnx").exists()
    asked = run_command("export", run_copy.path, "--export", "onnx:int8")
    assert asked.code == 5
    assert "calibration images" in asked.errors[0]


ONE_CLASS = "onnx:int8: the network puts all 20 calibration images into class"
#: An engine for Turing takes no matrix product in fp32.
NO_TURING = "tensorrt-rtx:fp32: tensorrt-rtx cannot build the engine for sm75"
MADE_OF_IT = "it is made of onnx:int8, which failed"


def test_what_does_not_depend_on_a_failed_export_is_made_all_the_same(run_copy: RunFolder) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    with np.load(run_copy.calibration) as archive:
        replace_pool(run_copy, np.repeat(archive["images"][:1], 20, axis=0))
    wanted = ("onnx:int8", "openvino:int8", "tensorrt-rtx:fp32", "onnx:fp16", "kit")
    outcome = run_command(
        *("export", run_copy.path, "--gpu", "sm75", "--json"), *(word for name in wanted for word in ("-e", name))
    )
    assert outcome.code == 5
    (error,) = outcome.errors
    assert error.startswith(f"error: {ONE_CLASS}")
    assert f"; openvino:int8: {MADE_OF_IT}; {NO_TURING}" in error
    assert "onnx:fp16" not in error
    told = [line for line in outcome.err.splitlines() if line.startswith("not exported: ")]
    assert [line.split(": ")[1] for line in told] == ["onnx:int8", "openvino:int8", "tensorrt-rtx:fp32"]
    assert set(json.loads(outcome.out)) == {"student.fp16.onnx"}
    made = {record.file for record in check_unchanged(run_copy.path).artifacts}
    assert made == {"artifacts/student.onnx", "artifacts/student.fp16.onnx"}
    assert (run_copy.artifacts / "kit" / "student.fp16.onnx").exists()


def test_failures_of_one_kind_keep_their_exit_code_and_a_full_disk_ends_it(run_copy: RunFolder) -> None:
    unknown = run_command("export", run_copy.path, "-e", "onnx:fp16", "-e", "onnx:int8", "--keep-fp32", "nowhere")
    assert unknown.code == 2
    assert all(f"{name}: no node 'nowhere'" in unknown.errors[0] for name in ("onnx:fp16", "onnx:int8"))
    (run_copy.artifacts / "student.fp16.onnx").mkdir()
    full = run_command("export", run_copy.path, "-e", "onnx:fp16", "-e", "onnx:int8")
    assert full.code == 7
    assert "onnx:fp16: cannot write" in full.errors[0]
    assert not (run_copy.artifacts / "student.int8.onnx").exists()


def test_a_damaged_pool_is_an_error(run_copy: RunFolder) -> None:
    run_copy.calibration.write_bytes(b"PK\x03\x04 not a pool")
    with pytest.raises(DfadcError, match="cannot read the calibration images"):
        export_student(run_copy, ["onnx:int8"])
    replace_pool(run_copy, np.zeros((20, 3, 8, 8), np.uint8))
    with pytest.raises(DfadcError, match=r"holds images of \(3, 8, 8\)"):
        export_student(run_copy, ["onnx:int8"])


def test_artifacts_that_take_pixels_are_calibrated_with_pixels(run_copy: RunFolder) -> None:
    """Images normalised twice would stretch the range of what leaves the embedded normalisation."""
    outcome = run_command("export", run_copy.path, "-e", "onnx:int8", "--embed-normalisation", "--json")
    assert outcome.code == 0, outcome.err
    assert set(json.loads(outcome.out)) == {"student.onnx", "student.int8.onnx"}
    target = run_copy.artifacts / "student.int8.onnx"
    assert describe_onnx(target)["metadata"]["dfadc.input"].startswith("pixels")
    model = onnx.load(target)
    first = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}[first.input[1]]
    brightest = max(abs(bound[0]) for bound in run_copy.contract().value_range())
    assert float(scale) * 127 <= 1.01 * brightest
    report = json.loads(run_command("verify", run_copy.path, "--json").out)
    assert report["artifacts"]["student.int8.onnx"]["comparisons"]["A"]["all"]["agreement"] >= 0.95


def test_gpus_batch_and_workspace_reach_the_engine(run_copy: RunFolder) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    outcome = run_command(
        *("export", run_copy.path, "-e", "tensorrt-rtx:fp16", "--gpu", "sm86, SM89", "--batch", "1,4,16"),
        *("--workspace", 256, "--json", "--quiet"),
    )
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert json.loads(outcome.out)["student.fp16.rtx.engine"]["targets"] == ["sm86", "sm89"]
    sidecar = json.loads((run_copy.artifacts / "student.fp16.rtx.engine.json").read_text())
    assert sidecar["batch"] == [1, 4, 16]
    assert sidecar["gpus"] == ["sm86", "sm89"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "sm86"), "target GPUs given"),
        (("--workspace", "64"), "a workspace limit given"),
        (("--batch", "8"), "a batch profile given"),
        (("--keep-fp32", "fc/Gemm"), "nodes to keep in fp32 given"),
        (("--batch", "8,4"), "--batch '8,4' is not LOWEST,OPTIMUM,HIGHEST"),
        (("--batch", "8,4,2"), "batch profile 8,4,2 is not"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    arguments: tuple[str, ...], message: str, finished_run: RunFolder
) -> None:
    outcome = run_command("export", finished_run.path, "-e", "onnx", *arguments)
    assert outcome.code == 2
    assert message in outcome.errors[0]


def test_a_node_is_kept_in_fp32_by_name(run_copy: RunFolder) -> None:
    name = next(n.name for n in onnx.load(run_copy.artifacts / "student.onnx").graph.node if n.op_type == "Conv")
    outcome = run_command("export", run_copy.path, "-e", "onnx:int8", "--keep-fp32", name, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["student.int8.onnx"]["precision"] == "int8, 1 nodes in fp32"


def test_int8_that_is_asked_for_keeps_layers_as_the_default_one_does(run_copy: RunFolder) -> None:
    """A pixel that is far too bright stretches every range: with all layers in INT8 the gate is missed."""
    images = np.random.default_rng(0).normal(size=(64, *run_copy.contract().input_size)).astype(np.float32)
    images[::2, :, 0, 0] = 3000
    for exports in (["onnx:int8"], ["onnx:int8", "onnx:fp16"]):
        settings = BuildSettings(calibration=images, calibrator="minmax")
        results = {result.path.name: result for result in export_student(run_copy, exports, settings=settings)}
        assert results["student.int8.onnx"].effective_precision != "int8"
    settings = BuildSettings(calibration=images, calibrator="minmax", keep_fp32=())
    (result,) = [r for r in export_student(run_copy, ["onnx:int8"], settings=settings) if "int8" in r.path.name]
    assert result.effective_precision == "int8"


def test_a_long_build_says_on_a_pipe_how_far_it_is(run_copy: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfadc.cli.console.PLAIN_INTERVAL", 0.0)
    outcome = run_command("export", run_copy.path, "-e", "onnx:int8")
    assert "building: calibrating INT8 1/3\n" in outcome.err
    assert "building" not in run_command("export", run_copy.path, "-e", "onnx:int8", "--quiet").err


def test_what_keep_fp32_takes(run_copy: RunFolder) -> None:
    assert run_command("export", run_copy.path, "-e", "onnx:int8", "--keep-fp32", "none").code == 0
    both = run_command("export", run_copy.path, "-e", "onnx:int8", "--keep-fp32", "none", "--keep-fp32", "auto")
    assert both.code == 2
    assert "none and auto contradict each other" in both.errors[0]


def test_distill_takes_it_too_and_refuses_it_before_the_first_step(digits_teacher: Path, tmp_path: Path) -> None:
    recipe = settings_flags({**QUICK_RECIPE, "steps": 2, "verify.min_fp16_agreement": 0.9})
    few = ("--student", QUICK_STUDENT, *recipe, "--out", tmp_path / "run")
    useless = run_command("distill", digits_teacher, *few, "-e", "onnx", "--keep-fp32", "auto")
    assert useless.code == 2
    assert "nodes to keep in fp32 given" in useless.errors[0]
    assert not (tmp_path / "run").exists()
    made = run_command("distill", digits_teacher, *few, "-e", "onnx:fp16", "--keep-fp32", "classifier/Gemm", "--quiet")
    assert made.code in (0, 3), made.err
    record = Manifest.read(tmp_path / "run").find("artifacts/student.fp16.onnx")
    assert record is not None
    assert record.effective_precision == "fp16, 1 nodes in fp32"


def test_progress_of_a_build_is_told_and_cancels_it(run_copy: RunFolder) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    told: list[tuple[str, int, int]] = []

    def interrupt_the_third(phase: str, done: int, steps: int) -> None:
        told.append((phase, done, steps))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_student(run_copy, ["tensorrt-rtx:fp16"], settings=BuildSettings(on_progress=interrupt_the_third))
    assert len(told) == 3
    assert all(phase and 1 <= done <= steps for phase, done, steps in told)
    assert not (run_copy.artifacts / "student.fp16.rtx.engine").exists()
    assert (run_copy.artifacts / "student.fp16.onnx").exists()


def test_a_plan_names_sources_first() -> None:
    assert [str(request) for request in plan_exports(["openvino:int8"]).requests] == [
        "onnx:fp32",
        "onnx:int8",
        "openvino:int8",
    ]
