"""Gates, and what CI is told, by the commands a person or a job types."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from command_line import command_process, files_of, finish_command, run_command, settings
from conftest import QUICK_RECIPE
from judged_runs import checks_of, copy_of, verified
from onnx import numpy_helper

import dfadc
from dfadc.pipeline.gates import gate_thresholds
from dfadc.verification.samples import SampleSet
from dfadc.verification.thresholds import Thresholds

if TYPE_CHECKING:
    from dfadc.run_folder import RunFolder

NO_TORCH = "sys.modules['torch'] = None"


def test_one_artifact_needs_neither_torch_nor_its_run(judged_run: RunFolder, baseline: Path, digits_data: Path) -> None:
    """Its gates are those of the recipe beside the samples: auto's would fail this student."""
    artifact = judged_run.artifacts / "student.fp16.onnx"
    flags = (
        "--samples",
        judged_run.samples,
        "--baseline",
        baseline,
        "--data",
        digits_data,
        "--junit",
        judged_run.path / "junit.xml",
    )
    with command_process("verify", artifact, *flags, "--json", preamble=NO_TORCH, imports_done=False) as process:
        outcome = finish_command(process)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["gate"]["min_agreement"] == QUICK_RECIPE["verify.min_agreement"]
    (entry,) = report["artifacts"].values()
    assert checks_of(entry, "D") == {"drop": "PASS", "accuracy drop": "PASS"}
    assert report["baseline"]["missing"] == []
    assert report["baseline"]["data"]["n"] == 397


def test_samples_that_lie_alone_are_judged_by_the_recipe_that_is_named(judged_run: RunFolder, workplace: Path) -> None:
    artifact = judged_run.artifacts / "student.onnx"
    shutil.copy(judged_run.samples, "samples.npz")
    report = json.loads(run_command("verify", artifact, "--samples", "samples.npz", "--json").out)
    assert report["gate"]["min_agreement"] == dfadc.load_recipe("auto").verify.min_agreement
    assert "gates of recipe auto: no recipe.toml lies beside samples.npz, and none was named" in report["notes"]
    assert verified(artifact, "--samples", "samples.npz", "--recipe", judged_run.recipe)["notes"] == []
    Path("strict.toml").write_text("[verify]\nmin_agreement = 1.0\n", encoding="utf-8")
    assert verified(artifact, "--samples", "samples.npz", "--recipe", "strict.toml", code=3)["notes"] == []


def test_one_artifact_is_judged_as_what_it_is_or_is_said_to_be(judged_run: RunFolder) -> None:
    arguments = (judged_run.artifacts / "student.fp16.onnx", "--samples", judged_run.samples)
    assert set(checks_of(verified(*arguments)["artifacts"]["student.fp16.onnx"], "A")) == {"agreement", "sqnr"}
    report = verified(*arguments, "--precision", "fp32", code=3)
    assert checks_of(report["artifacts"]["student.fp16.onnx"], "A")["logit error"] == "FAIL"


def test_nan_fails(judged_run: RunFolder, baseline: Path, workplace: Path) -> None:
    model = onnx.load(judged_run.artifacts / "student.onnx")
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(np.nan), weight.name))
    onnx.save(model, "student.onnx")
    report = verified("student.onnx", "--samples", judged_run.samples, "--baseline", baseline, code=3)
    entry = report["artifacts"]["student.onnx"]
    assert checks_of(entry, "A") == checks_of(entry, "D") == {"finite": "FAIL"}


def test_no_samples_fail(judged_run: RunFolder, tmp_path: Path) -> None:
    candidate = copy_of(judged_run, tmp_path / "candidate")
    samples = SampleSet.load(judged_run.samples)
    logits = np.empty((0, 10), np.float32)
    nothing = replace(
        samples,
        images=samples.images[:0],
        source=samples.source[:0],
        teacher_logits=logits,
        student_logits=logits,
    )
    nothing.save(candidate.samples)
    assert "no samples" in verified(candidate.path, code=3)["student"]["reasons"][0]
    outcome = run_command("baseline", candidate.path, "-o", tmp_path / "b.npz")
    assert (outcome.code, outcome.out) == (3, "")
    assert "has no samples" in outcome.errors[0]
    assert not (tmp_path / "b.npz").exists()


# Gates


def test_the_accuracy_is_gated_by_its_lower_bound(judged_run: RunFolder, digits_data: Path) -> None:
    alone = (judged_run.artifacts / "student.onnx", "--samples", judged_run.samples, "--data", digits_data)
    measured = verified(*alone)["artifacts"]["student.onnx"]
    held = verified(*alone, "--min-accuracy", measured["accuracy_low"] - 0.01)
    assert held["verdict"] == "PASS"
    assert checks_of(held["artifacts"]["student.onnx"], "E") == {"accuracy": "PASS"}
    assert checks_of(held["student"], "E") == {}  # it is not here, only its answers are
    failed = verified(judged_run.path, "--data", digits_data, "--min-accuracy", measured["accuracy"], code=3)
    for entry in (failed["student"], *failed["artifacts"].values()):
        assert checks_of(entry, "E") == {"accuracy": "FAIL"}


def test_a_gate_of_the_recipe_that_needs_labels_does_not_go_without(
    judged_run: RunFolder, digits_data: Path, tmp_path: Path
) -> None:
    candidate = copy_of(judged_run, tmp_path / "candidate")
    recipe = candidate.recipe.read_text()
    candidate.recipe.write_text(recipe.replace('min_accuracy = "off"', "min_accuracy = 0.01"))
    assert candidate.recipe.read_text() != recipe
    outcome = run_command("verify", candidate.path)
    assert (outcome.code, outcome.out) == (4, "")
    assert "needs labelled images" in outcome.errors[0]
    artifact = (candidate.artifacts / "student.onnx", "--samples", candidate.samples)
    assert run_command("verify", *artifact).code == 4
    assert verified(*artifact, "--data", digits_data)["verdict"] == "PASS"
    assert verified(*artifact, "--set", "verify.min_accuracy=off")["verdict"] == "PASS"


def test_the_gates_defaults_are_the_recipes() -> None:
    """A device kit has no recipe: what it falls back on is said twice."""
    thresholds = gate_thresholds(dfadc.Recipe())
    assert thresholds == Thresholds(min_agreement=0.7, min_coverage=0.5, max_baseline_drop=0.01)


def test_every_gate_of_the_recipe_can_be_set(judged_run: RunFolder) -> None:
    flags = settings(
        {"verify.min_fp16_agreement": 1.0, "verify.min_class_agreement": 0.01, "verify.min_coverage": "off"}
    )
    artifact = (judged_run.artifacts / "student.fp16.onnx", "--samples", judged_run.samples)
    report = verified(*artifact, *flags, code=3)
    assert checks_of(report["artifacts"]["student.fp16.onnx"], "A")["agreement"] == "FAIL"
    assert "class agreement" in checks_of(report["student"], "B")
    assert checks_of(report["student"], "C") == {"coverage": "NOT GATED"}
    assert report["gate"]["export"]["fp16"]["min_agreement"] == 1


# What CI is told


def test_junit_is_written_and_says_what_the_report_says(judged_run: RunFolder, workplace: Path) -> None:
    verify = (
        "verify",
        judged_run.artifacts / "student.onnx",
        "--samples",
        judged_run.samples,
        "--junit",
        "out/junit.xml",
    )
    assert run_command(*verify).code == 0
    root = ET.parse("out/junit.xml").getroot()  # noqa: S314 -- written a line above
    assert root.get("failures") == root.get("errors") == "0"
    assert [suite.get("name") for suite in root] == ["fp32 student", "student.onnx", "required", "verdict"]
    assert run_command(*verify, "--require", "no.onnx").code == 4
    failures = list(ET.parse("out/junit.xml").getroot().iter("failure"))  # noqa: S314
    assert [str(failure.get("message")) for failure in failures] == [
        "no.onnx is required and did not run",
        "NOT RUN; required but NOT RUN: no.onnx (exit code 4)",
    ]
    # Nothing of an earlier job is left where a later one does not come to its end.
    assert run_command(*verify, "--baseline", "nowhere.npz").code == 4
    root = ET.parse("out/junit.xml").getroot()  # noqa: S314
    (error,) = root.iter("error")
    assert error.get("message") == "there is no baseline nowhere.npz"


@pytest.mark.parametrize("path", ["a_file/junit.xml", "a_folder"])
def test_junit_that_cannot_be_written_is_known_before_any_work(
    path: str, judged_run: RunFolder, digits_teacher: Path, workplace: Path
) -> None:
    Path("a_file").touch()
    Path("a_folder").mkdir()
    before = files_of(judged_run.path)
    for command in (("verify", judged_run.path), ("distill", digits_teacher, "--out", "new")):
        outcome = run_command(*command, "--junit", path)
        assert (outcome.code, outcome.out) == (7, ""), outcome.err
        assert path in outcome.errors[0]
        assert "--junit" in outcome.hints[0]
    assert files_of(judged_run.path) == before
    assert not Path("new").exists()


def test_github_gets_a_summary_and_annotations_and_stdout_stays_json(
    judged_run: RunFolder, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("summary.md").write_text("of an earlier step\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    verify = ("verify", judged_run.artifacts / "student.onnx", "--samples", judged_run.samples)
    outcome = run_command(*verify, "--min-agreement", 1, "--json")
    assert json.loads(outcome.out)["exit_code"] == outcome.code == 3
    summary = Path("summary.md").read_text()
    assert summary.startswith("of an earlier step\n# Verification: FAIL\n")
    assert "| student.onnx | FAIL |" in summary
    assert "::error title=fp32 student%3A FAIL::B distillation: " in outcome.err
    outcome = run_command(*verify, "--baseline", "nowhere.npz")
    assert "::error title=dfadc::there is no baseline nowhere.npz" in outcome.err
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "no/such/folder.md")
    outcome = run_command(*verify)
    assert outcome.code == 0
    assert "warning: cannot write $GITHUB_STEP_SUMMARY" in outcome.err


def test_elsewhere_nothing_is_annotated(judged_run: RunFolder, workplace: Path) -> None:
    outcome = run_command(
        "verify", judged_run.artifacts / "student.onnx", "--samples", judged_run.samples, "--min-agreement", 1
    )
    assert outcome.code == 3
    assert "::" not in outcome.err
    assert files_of(workplace) == {}
