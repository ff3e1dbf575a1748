"""A teacher of several labels an image through the whole house: distilled, exported, verified and reported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import pytest
import torch
from command_line import ROOT, run_command
from judged_runs import verified
from small_labels import LABELS_CONTRACT, LabelTeacher, compose, normalise, train

import dfadc
from dfadc.networks.names import build_architecture
from dfadc.pipeline.distill import load_run_teacher
from dfadc.verification.samples import SampleSet
from exporters.sessions.onnx_runtime import OnnxRuntimeSession

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.run_folder import RunFolder

ARTIFACTS = ("student.onnx", "student.fp16.onnx", "student.int8.ort-cpu.onnx")


@pytest.fixture(scope="module")
def report(label_run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(label_run.report_json.read_text())
    return found


def test_the_command_says_what_it_takes_the_teacher_for(label_run: RunFolder) -> None:
    said = (label_run.path.parent / "err.txt").read_text()
    assert "task = multilabel" in said
    assert "overlay multilabel sets" in said
    assert label_run.contract() == LABELS_CONTRACT
    assert load_run_teacher(label_run).contract.task == "multilabel"


def test_every_artifact_is_verified_by_its_labels(report: dict[str, Any]) -> None:
    assert report["task"] == "multilabel"
    assert {name: entry["verdict"] for name, entry in report["artifacts"].items()} == dict.fromkeys(ARTIFACTS, "PASS")
    exact = report["artifacts"]["student.onnx"]["comparisons"]["A"]["all"]
    assert exact["k"] + exact["num_tied_disagreements"] == exact["n"] == 384
    assert len(exact["per_class"]) == 10
    gates = {check["gate"]: check["message"] for check in report["student"]["checks"]}
    assert "one set of labels" in gates["agreement"]
    assert "states of labels" in gates["class agreement"]
    assert report["coverage"]["prior"]["num_empty"] == 0


def test_agreement_is_that_of_whole_sets(label_run: RunFolder, report: dict[str, Any]) -> None:
    samples = SampleSet.load(label_run.samples)
    with OnnxRuntimeSession(label_run.artifacts / "student.onnx") as session:
        logits = session.run(samples.normalised())
    part = samples.of_source("prior")
    same = ((logits > 0) == (samples.teacher_logits > 0))[part]
    assert report["artifacts"]["student.onnx"]["agreement"] == pytest.approx(same.all(axis=1).mean())
    states = report["artifacts"]["student.onnx"]["comparisons"]["B"]["prior"]["per_class"]
    assert sum(entry["k"] for entry in states) == same.sum()


def test_accuracy_is_of_every_label(label_teacher: LabelTeacher, label_run: RunFolder, report: dict[str, Any]) -> None:
    labelled = report["accuracy"]
    assert labelled["teacher_labels"]["mean"] == pytest.approx(label_teacher.accuracy, abs=0.03)
    canvases = compose(300, seed=1, held_out=True)
    with OnnxRuntimeSession(label_run.artifacts / "student.onnx") as session:
        right = (session.run(normalise(canvases.images).numpy()) > 0) == (canvases.labels == 1)
    assert labelled["student"] == pytest.approx(right.all(axis=1).mean(), abs=0.005)
    assert [entry["k"] / 300 for entry in labelled["student_labels"]["per_label"]] == pytest.approx(
        right.mean(axis=0), abs=0.005
    )
    artifact = report["artifacts"]["student.onnx"]
    assert artifact["labels"]["mean"] == pytest.approx(right.mean(), abs=0.005)


def test_the_report_is_of_its_schema_and_names_labels(label_run: RunFolder, report: dict[str, Any]) -> None:
    jsonschema.validate(report, json.loads((ROOT / "dfadc/reporting/report.schema.json").read_text()))
    page, text = label_run.report_html.read_text(), label_run.report_md.read_text()
    for shown in (page, text):
        assert "label agreement with teacher" in shown
        assert "three: on" in shown
        assert "three: off" in shown
    assert "Agreement in every label of a sample" in text
    assert "of every label of a sample" in page
    assert "Confusion" not in text


def test_what_ci_reads(label_run: RunFolder, labels_data: Path, tmp_path: Path) -> None:
    """Baseline, JUnit and a gate on accuracy; a worse student fails against the baseline."""
    run = tmp_path / "run"
    shutil.copytree(label_run.path, run)
    outcome = run_command("baseline", run, "-o", tmp_path / "b.npz", "--data", labels_data)
    assert outcome.code == 0, outcome.err
    junit = tmp_path / "junit.xml"
    found = verified(run, "--baseline", tmp_path / "b.npz", "--data", labels_data, "--junit", junit)
    assert found["verdict"] == "PASS"
    assert found["baseline"]["networks"]["student.onnx"]["agreement"]["gated"]["lost"] == 0
    cases = {case.attrib["name"] for case in ET.parse(junit).iter("testcase")}  # noqa: S314 -- our own file
    assert {"B distillation: class agreement", "C coverage: coverage", "D baseline: accuracy drop"} <= cases
    found = verified(run, "--data", labels_data, "--set", "verify.min_accuracy=0.99", code=3)
    assert any("accuracy" in reason for reason in found["student"]["reasons"])


def test_the_kit_checks_itself_and_finds_a_lost_label(label_run: RunFolder, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    shutil.copytree(label_run.artifacts / "kit", kit)
    command = [sys.executable, "-I", str(kit / "check.py"), "student.onnx", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task"] == "multilabel"
    samples = SampleSet.load(kit / "samples.npz")
    worse = samples.student_logits.copy()
    worse[:, 2] = -np.abs(worse[:, 2]) - 1
    replace(samples, student_logits=worse).save(kit / "samples.npz")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)  # noqa: S603
    assert done.returncode == 3, done.stderr


def test_embedded_probabilities_are_refused(label_run: RunFolder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(label_run.path, run)
    outcome = run_command("export", run, "-e", "onnx", "--embed-softmax")
    assert outcome.code == 2
    assert "could not be verified" in outcome.errors[0]


@pytest.mark.parametrize("recipe", ["pool", "dfad"])
def test_other_recipes_take_labels_or_say_why_not(recipe: str, label_teacher: LabelTeacher) -> None:
    outcome = run_command(
        "distill", label_teacher.path, "--student", "compact_resnet_8", "--recipe", recipe, "--steps", 40, "--dry-run"
    )
    if recipe == "pool":
        assert outcome.code == 2
        assert "needs one class an image, and this teacher has several labels" in outcome.errors[0]
    else:
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.zeros(20, np.int64), r"`labels` is (20,) for 20 images and a teacher of 5 labels"),
        (np.zeros((20, 4), np.int64), r"`labels` is (20, 4)"),
        (np.full((20, 5), -1), "`labels` hold -1; 1 is on and 0 is off"),
        (np.full((20, 5), 0.5), "`labels` hold 0.5"),
        (np.full((20, 5), "on"), "`labels` have dtype"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(
    labels: np.ndarray[Any, Any], says: str, label_run: RunFolder, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((20, 1, 16, 16), np.uint8), labels=labels)
    outcome = run_command("verify", label_run.path, "--data", tmp_path / "data.npz")
    assert outcome.code == 2
    assert says in outcome.errors[0]
    assert "1 where label k is on" in outcome.hints[0] or "labels > 0" in outcome.hints[0]


def test_truth_values_are_labels(label_run: RunFolder, labels_data: Path, tmp_path: Path) -> None:
    with np.load(labels_data) as data:
        np.savez(tmp_path / "data.npz", images=data["images"], labels=data["labels"] == 1)
    data = dfadc.verify_run(label_run, dfadc.VerifySettings(data=tmp_path / "data.npz"))
    assert data["accuracy"]["n"] == 300


def test_a_folder_of_classes_holds_no_labels(label_run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "images" / "one").mkdir(parents=True)
    outcome = run_command("verify", label_run.path, "--data", tmp_path / "images")
    assert outcome.code == 2
    assert "one class each, not several labels" in outcome.errors[0]


@pytest.mark.slow
def test_a_student_is_nearly_as_good_as_its_teacher(tmp_path: Path) -> None:
    """On 1,000 canvases of held-out digits, every label right: 97.1% of the teacher, 92.8% of the student."""
    torch.manual_seed(0)
    network = train(build_architecture("compact_resnet_16", LABELS_CONTRACT).module, steps=600)
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    canvases = compose(1000, seed=1, held_out=True)
    np.savez(tmp_path / "data.npz", images=canvases.images, labels=canvases.labels)
    outcome = run_command(
        *("distill", tmp_path / "teacher.pt", "--teacher-arch", "compact_resnet_16", "--task", "multilabel"),
        *("--input-size", "1x16x16", "--mean", 0.22, "--std", 0.34, "--student", "compact_resnet_8", "--steps", 300),
        *("-e", "onnx", "-e", "onnx:int8", "--data", tmp_path / "data.npz", "--out", tmp_path / "run", "--json"),
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["verdict"] == "PASS"
    assert found["accuracy"]["teacher"] > 0.95
    assert found["accuracy"]["student"] > found["accuracy"]["teacher"] - 0.07
