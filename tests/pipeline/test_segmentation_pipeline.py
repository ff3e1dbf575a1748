"""A segmentation teacher through the whole house: distilled, exported, verified, reported, carried to a device."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import pytest
from command_line import ROOT, run_command
from small_scenes import SCENE_CONTRACT, SceneTeacher, compose

from dfadc.verification.pixel_samples import DenseSampleSet, load_samples
from exporters.sessions.onnx_runtime import OnnxRuntimeSession

if TYPE_CHECKING:
    from pathlib import Path

    from command_line import Outcome

    from dfadc.run_folder import RunFolder

ARTIFACTS = ("student.onnx", "student.fp16.onnx", "student.int8.ort-cpu.onnx")


@pytest.fixture(scope="module")
def report(scene_run: tuple[RunFolder, Outcome]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(scene_run[1].out)
    return found


def test_the_command_says_what_it_takes_the_teacher_for(scene_run: tuple[RunFolder, Outcome]) -> None:
    run, outcome = scene_run
    assert "task = segmentation" in outcome.err
    assert "overlay segmentation sets" in outcome.err
    assert run.contract() == SCENE_CONTRACT


def test_every_artifact_is_verified_by_its_pixels(report: dict[str, Any]) -> None:
    assert {name: entry["verdict"] for name, entry in report["artifacts"].items()} == dict.fromkeys(ARTIFACTS, "PASS")
    exact = report["artifacts"]["student.onnx"]["comparisons"]["A"]["all"]
    assert exact["k"] + exact["num_ties"] >= exact["n"] == 64 * 37 * 51
    assert exact["max_logit_error"] < 1e-4
    rounded = report["artifacts"]["student.int8.ort-cpu.onnx"]["comparisons"]["A"]["all"]
    assert rounded["max_logit_error"] > 0
    assert rounded["mean_iou_low"] <= rounded["mean_iou"] < 1


def test_the_report_is_of_its_schema_and_shows_scenes(
    scene_run: tuple[RunFolder, Outcome], report: dict[str, Any]
) -> None:
    run, _ = scene_run
    schema = json.loads((ROOT / "dfadc/reporting/report.schema.json").read_text())
    jsonschema.validate(report, schema)
    page, text = run.report_html.read_text(), run.report_md.read_text()
    assert page.count("<figcaption>difference</figcaption>") >= 6
    assert "mean IoU with teacher" in page
    assert "mean IoU on masks" in text
    assert "bootstrap over images" in text


def test_accuracy_is_of_labelled_pixels(scene_teacher: SceneTeacher, report: dict[str, Any]) -> None:
    labelled = report["accuracy"]
    assert labelled["n"] == 40 * 36 * 51, "the upper row is not labelled"
    assert labelled["teacher_iou"]["mean_iou"] == pytest.approx(scene_teacher.mean_iou, abs=0.1)
    assert labelled["teacher_low"] <= labelled["teacher"] <= labelled["teacher_high"] < 1
    assert any("have the ignore label 255" in note for note in report["notes"])


def test_answers_are_stored_compactly(scene_run: tuple[RunFolder, Outcome]) -> None:
    run, _ = scene_run
    samples = load_samples(run.samples)
    assert isinstance(samples, DenseSampleSet)
    whole = 2 * len(samples) * 3 * 37 * 51 * 4
    assert run.samples.stat().st_size < 0.6 * whole
    with OnnxRuntimeSession(run.artifacts / "student.onnx") as session:
        logits = session.run(samples.normalised())
    assert logits.shape == (64, 3, 37, 51)
    assert (logits.argmax(axis=1) == samples.student.classes).mean() > 0.9999
    margins = np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0]
    np.testing.assert_allclose(margins, samples.student.margins, atol=0.02)


def test_one_artifact_is_verified_without_torch(scene_run: tuple[RunFolder, Outcome]) -> None:
    run, _ = scene_run
    program = "import sys; sys.modules['torch'] = None\nfrom dfadc.cli.main import main\nmain()"
    command = [sys.executable, "-c", program, "verify", run.artifacts / "student.onnx", "--samples", run.samples]
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artifacts"]["student.onnx"]["verdict"] == "PASS"


def test_the_kit_checks_itself(scene_run: tuple[RunFolder, Outcome], tmp_path: Path) -> None:
    run, _ = scene_run
    kit = tmp_path / "kit"
    shutil.copytree(run.artifacts / "kit", kit)
    command = [sys.executable, "-I", str(kit / "check.py"), "student.onnx", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "mean_iou" in json.loads(done.stdout)["artifacts"]["student.onnx"]["comparisons"]["A"]["all"]


def test_a_damaged_artifact_fails(scene_run: tuple[RunFolder, Outcome], tmp_path: Path) -> None:
    """One whose answers lie a few pixels beside the frozen student's."""
    run, _ = scene_run
    samples = load_samples(run.samples)
    assert isinstance(samples, DenseSampleSet)
    shifted = np.roll(samples.student.classes, 3, axis=2)
    replace(samples, student=replace(samples.student, classes=shifted)).save(tmp_path / "samples.npz")
    outcome = run_command("verify", run.artifacts / "student.onnx", "--samples", tmp_path / "samples.npz")
    assert outcome.code == 3
    assert "differ from the fp32 student's" in outcome.out


def test_a_band_along_borders_can_be_left_out(scene_run: tuple[RunFolder, Outcome]) -> None:
    run, _ = scene_run
    outcome = run_command(
        *("verify", run.artifacts / "student.onnx", "--samples", run.samples, "--json"),
        *("--set", "verify.boundary_width=2"),
    )
    found = json.loads(outcome.out)["artifacts"]["student.onnx"]["comparisons"]
    assert found["B"]["all"]["n"] < found["A"]["all"]["n"]


def test_an_artifact_of_any_size(scene_run: tuple[RunFolder, Outcome], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scene_run[0].path, run)
    outcome = run_command("export", run, "-e", "onnx", "-e", "onnx:fp16", "--dynamic-size")
    assert outcome.code == 0, outcome.err
    for name in ("student.onnx", "student.fp16.onnx"):
        with OnnxRuntimeSession(run / "artifacts" / name) as session:
            answers = session.run(np.zeros((2, 1, 50, 33), np.float32))
        assert answers.shape == (2, 3, 50, 33)
    assert run_command("verify", run, "--json").code == 0


def test_openvino_answers_every_pixel(scene_run: tuple[RunFolder, Outcome], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    run = tmp_path / "run"
    shutil.copytree(scene_run[0].path, run)
    assert run_command("export", run, "-e", "openvino:fp16", "-e", "openvino:int8:ort-cpu").code == 0
    found = json.loads(run_command("verify", run, "--json").out)["artifacts"]
    for name in ("student.fp16.openvino.xml", "student.int8.ort-cpu.openvino.xml"):
        assert found[name]["verdict"] == "PASS", found[name]["reasons"]


def test_a_baseline_of_pixels_is_refused(scene_run: tuple[RunFolder, Outcome], tmp_path: Path) -> None:
    outcome = run_command("baseline", scene_run[0].path, "-o", tmp_path / "baseline.npz")
    assert outcome.code == 2
    assert "one prediction an image" in outcome.err
    assert not (tmp_path / "baseline.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "classification"], "task is classification (command line), but the teacher's outputs say segment"),
        (["--student", "compact_resnet_8"], "the teacher predicts every pixel"),
        (["--input-size", "3x37x51"], "the first layer of the weights takes 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    scene_teacher: SceneTeacher, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = run_command("distill", scene_teacher.path, *arguments, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "run").exists()


def test_masks_that_do_not_match_are_refused_before_the_first_step(scene_teacher: SceneTeacher, tmp_path: Path) -> None:
    scenes = compose(12, seed=3, held_out=True)
    np.savez(tmp_path / "bad.npz", images=scenes.images, masks=scenes.masks + 1)
    outcome = run_command(
        *("distill", scene_teacher.path, "--student", "compact_unet_9"),
        *("--data", tmp_path / "bad.npz", "--out", tmp_path / "run"),
    )
    assert outcome.code == 2
    assert "masks run from 1 to 3, the teacher has classes 0 to 2" in outcome.err
    assert not (tmp_path / "run").exists()
