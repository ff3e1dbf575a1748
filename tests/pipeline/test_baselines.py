"""Baselines: what one holds, and what is held against it, by the commands a person or a job types."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from command_line import files_of, run_command, settings
from conftest import QUICK_RECIPE, QUICK_STUDENT
from judged_runs import checks_of, classes_of, copy_of, fair_coin, verified

import dfadc
from dfadc.verification.baseline import Baseline
from dfadc.verification.samples import SampleSet

if TYPE_CHECKING:
    from pathlib import Path

    from command_line import Outcome

    from dfadc.run_folder import RunFolder


ONE_STEP = {**QUICK_RECIPE, "steps": 1}


def test_a_baseline_holds_what_every_network_answers(
    judged_run: RunFolder, frozen_baseline: tuple[Path, Outcome]
) -> None:
    file, outcome = frozen_baseline
    assert outcome.code == 0, outcome.err
    known, samples = Baseline.load(file), SampleSet.load(judged_run.samples)
    assert list(known.predictions) == ["student", "student.onnx", "student.fp16.onnx"]
    assert known.teacher_sha256 == judged_run.record()["teacher"]["sha256"]
    assert known.samples.sha256 == samples.sha256
    for name in ("student.onnx", "student.fp16.onnx"):
        np.testing.assert_array_equal(known.predictions[name], classes_of(judged_run.artifacts / name, samples))
    printed = json.loads(outcome.out)
    teacher, prior = samples.teacher_logits.argmax(1), np.array(samples.sources)[samples.source] == "prior"
    assert printed["gated_sources"] == ["prior"]
    for name, rates in printed["networks"].items():
        assert rates["agreement"] == pytest.approx((known.predictions[name] == teacher)[prior].mean())
    assert printed["data"]["n"] == 397
    assert f"baseline: {file}" in outcome.err


def test_its_labelled_results_are_the_accuracy(
    frozen_baseline: tuple[Path, Outcome], command_run: tuple[RunFolder, Outcome]
) -> None:
    """That of the same student, which another command measured."""
    printed, report = json.loads(frozen_baseline[1].out), json.loads(command_run[1].out)
    assert printed["networks"]["student"]["accuracy"] == pytest.approx(report["accuracy"]["student"])
    assert printed["networks"]["student.onnx"]["accuracy"] == pytest.approx(report["accuracy"]["student"])


def test_the_agreement_is_that_of_verify_and_the_heading_says_on_what(judged_run: RunFolder, workplace: Path) -> None:
    outcome = run_command("baseline", judged_run.path, "-o", "b.npz")
    report = verified(judged_run.path, "--set", "verify.gate_source=prior", "--min-agreement", 0.01)
    assert "agreement with teacher (source prior)" in outcome.out
    for name, entry in {"student": report["student"], **report["artifacts"]}.items():
        assert re.search(rf"│ {re.escape(name)} +│ {entry['agreement']:.2%} ", outcome.out)


def test_a_baseline_says_what_it_cannot_do(judged_run: RunFolder, digits_data: Path, tmp_path: Path) -> None:
    """It is frozen all the same: the person at the terminal decides, and is told."""
    run = copy_of(judged_run, tmp_path / "run")
    recipe = run.recipe.read_text()
    few = tmp_path / "few.npz"
    with np.load(digits_data) as data:
        np.savez(few, images=data["images"][:4], labels=data["labels"][:4])

    def notes(*flags: object) -> list[str]:
        outcome = run_command("baseline", run.path, "-o", tmp_path / "b.npz", "--force", "--json", *flags)
        assert outcome.code == 0, outcome.err
        found: list[str] = json.loads(outcome.out)["notes"]
        assert [f"note: {note}" for note in found] == [
            line for line in outcome.err.splitlines() if line.startswith("note: ")
        ]
        return found

    (blind,) = notes()
    num_prior = SampleSet.load(run.samples).counts()["prior"]
    assert blind == (
        f"baseline: agreement may drop by 1 points ({num_prior} pairs cannot show a drop of less than "
        f"{500 / num_prior:.4g} points)"
    )
    # Four labelled images.
    (too_few, *_) = (note for note in notes("--data", few) if "accuracy" in note)
    assert "will fail whatever is predicted: D baseline: accuracy on labelled images" in too_few
    assert "too few to tell" in too_few
    report = verified(run.path, "--baseline", tmp_path / "b.npz", "--data", few, code=3)
    assert checks_of(report["student"], "D")["accuracy drop"] == "FAIL"
    # A student that its own run fails.
    run.recipe.write_text(recipe.replace("min_agreement = 0.1", "min_agreement = 1.0"))
    assert run.recipe.read_text() != recipe
    failing = [note for note in notes() if "fails its gates" in note]
    assert [note.split(" is frozen")[0] for note in failing] == [
        "the fp32 student",
        "student.onnx",
        "student.fp16.onnx",
    ]
    assert all("lower bound at least 100.00%" in note for note in failing)
    # No samples that were made for the teacher alone; and where the gate is off nothing is expected of it.
    samples = SampleSet.load(run.samples)
    replace(samples, sources=tuple(name.replace("prior", "other") for name in samples.sources)).save(run.samples)
    run.recipe.write_text(recipe)
    (missing,) = notes()
    assert missing.startswith("student, student.onnx, student.fp16.onnx will fail whatever is predicted: D baseline: ")
    assert "no samples of source 'prior'" in missing
    run.recipe.write_text(recipe.replace("max_baseline_drop = 0.01", 'max_baseline_drop = "off"'))
    assert notes() == []


def test_a_baseline_is_not_replaced_unasked(judged_run: RunFolder, workplace: Path) -> None:
    assert run_command("baseline", judged_run.path, "-o", "b.npz").code == 0
    before = files_of(workplace)
    outcome = run_command("baseline", judged_run.path, "-o", "b.npz")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--force" in outcome.hints[0]
    assert files_of(workplace) == before
    assert run_command("baseline", judged_run.path, "-o", "b.npz", "--force").code == 0
    assert files_of(workplace) == before


def test_a_run_is_no_worse_than_itself(judged_run: RunFolder, baseline: Path, digits_data: Path) -> None:
    report = verified(judged_run.path, "--baseline", baseline, "--data", digits_data)
    assert report["verdict"] == "PASS"
    for entry in (report["student"], *report["artifacts"].values()):
        assert checks_of(entry, "D") == {"drop": "PASS", "accuracy drop": "PASS"}
    compared = report["baseline"]
    assert (compared["missing"], compared["new"]) == ([], [])
    assert compared["data"]["n"] == 397
    assert compared["gated_sources"] == ["prior"]
    for pairs in compared["networks"]["student.fp16.onnx"]["agreement"].values():
        assert (pairs["lost"], pairs["gained"], pairs["p_value"]) == (0, 0, 1)
    assert "## D baseline (run, on its own samples)" in judged_run.report_md.read_text()


def test_a_worse_student_fails_on_the_baselines_samples(
    worse_run: RunFolder, judged_run: RunFolder, baseline: Path, digits_data: Path, tmp_path: Path
) -> None:
    """Counted here once more, from the files and by scipy."""
    candidate = copy_of(worse_run, tmp_path / "candidate")
    report = verified(candidate.path, "--baseline", baseline, "--data", digits_data, code=3)
    samples = SampleSet.load(judged_run.samples)
    teacher = samples.teacher_logits.argmax(1)
    assert len(set(classes_of(candidate.artifacts / "student.onnx", samples))) > 1  # else any samples would do
    right_before = classes_of(judged_run.artifacts / "student.onnx", samples) == teacher
    right_now = classes_of(candidate.artifacts / "student.onnx", samples) == teacher
    drawn_by = np.array(samples.sources)[samples.source]
    parts = {"gated": drawn_by == "prior", **{name: drawn_by == name for name in samples.sources}}
    for name in ("student", "student.onnx"):
        compared = report["baseline"]["networks"][name]["agreement"]
        assert set(compared) == set(parts)
        for source, pairs in compared.items():
            before, now = right_before[parts[source]], right_now[parts[source]]
            lost, gained = int((before & ~now).sum()), int((now & ~before).sum())
            assert (pairs["n"], pairs["lost"], pairs["gained"]) == (len(before), lost, gained)
            assert pairs["p_value"] == pytest.approx(fair_coin(lost, gained))
            assert pairs["before"] == pytest.approx(before.mean())
        labels = report["baseline"]["networks"][name]["accuracy"]
        assert labels["p_value"] == pytest.approx(fair_coin(labels["lost"], labels["gained"]))
        held = labels["drop"] <= 0.01 or labels["p_value"] >= 0.05
        entry = report["student"] if name == "student" else report["artifacts"][name]
        assert checks_of(entry, "D") == {"drop": "FAIL", "accuracy drop": "PASS" if held else "FAIL"}
    assert report["baseline"]["missing"] == ["student.fp16.onnx"]


def test_how_much_may_be_lost_is_asked_for(worse_run: RunFolder, baseline: Path) -> None:
    for flags, verdict, max_drop in (
        ((), "FAIL", 0.01),
        (("--max-drop", 1), "PASS", 1),
        (("--set", "verify.max_baseline_drop=1.0"), "PASS", 1),
        (("--set", "verify.max_baseline_drop=off"), "NOT GATED", None),
    ):
        artifact = (worse_run.artifacts / "student.onnx", "--samples", worse_run.samples, "--min-agreement", 1)
        report = verified(*artifact, "--baseline", baseline, *flags, code=3)
        assert checks_of(report["artifacts"]["student.onnx"], "D") == {"drop": verdict}
        assert report["baseline"]["max_drop"] == max_drop


def test_an_artifact_of_the_baseline_that_is_gone_is_missing(
    finished_run: RunFolder, baseline: Path, tmp_path: Path
) -> None:
    candidate = copy_of(finished_run, tmp_path / "candidate")
    report = verified(candidate.path, "--baseline", baseline, code=4)
    assert report["reasons"] == ["required but NOT RUN: student.fp16.onnx"]
    assert report["baseline"]["missing"] == ["student.fp16.onnx"]
    assert "the baseline holds student.fp16.onnx, which did not run" in report["notes"]


def test_a_backend_that_is_gone_is_missing_too(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    candidate = copy_of(finished_run, tmp_path / "candidate")
    assert run_command("export", candidate.path, "-e", "openvino:fp16", "--quiet").code == 0
    file = tmp_path / "baseline.npz"
    assert run_command("baseline", candidate.path, "-o", file, "--quiet").code == 0
    name = "student.fp16.openvino.xml"
    alone = (candidate.artifacts / name, "--samples", candidate.samples, "--set", "verify.min_fp16_agreement=0.9")
    assert verified(*alone)["verdict"] == "PASS"
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['openvino'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the process that would open it
    for arguments in ((candidate.path, "--baseline", file), alone):
        report = verified(*arguments, code=4)
        assert report["artifacts"][name]["verdict"] == "NOT RUN"
        assert report["reasons"] == [f"required but NOT RUN: {name}"]


def test_a_cpu_whose_int8_saturates_fails_nothing_and_passes_nothing(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline of another CPU holds there, too: the graph is computed as it is quantised."""
    pytest.importorskip("openvino")
    candidate, name = copy_of(finished_run, tmp_path / "candidate"), "student.int8.openvino.xml"
    assert run_command("export", candidate.path, "-e", "openvino:int8", "--quiet").code == 0
    file = tmp_path / "baseline.npz"
    gates = ("--set", "verify.min_int8_agreement=0.8", "--set", "verify.min_int8_sqnr_db=10")
    assert run_command("baseline", candidate.path, "-o", file, "--quiet").code == 0
    assert verified(candidate.path, "--baseline", file, *gates)["artifacts"][name]["verdict"] == "PASS"
    monkeypatch.setattr("exporters.sessions.openvino_core.saturates", lambda: True)
    monkeypatch.setattr("dfadc.pipeline.inference.IsolatedSession", lambda opener, path, **how: opener(path, **how))
    junit = tmp_path / "junit.xml"
    report = verified(candidate.path, "--baseline", file, "--junit", junit, *gates)
    entry = report["artifacts"][name]
    assert (report["verdict"], entry["verdict"]) == ("NOT GATED", "NOT GATED")
    assert checks_of(entry, "D") == {"drop": "PASS"}
    assert ["lacks VNNI" in reason for reason in entry["reasons"]] == [True]
    assert "lacks VNNI" in junit.read_text()
    assert "lacks VNNI" in candidate.report_md.read_text()
    assert report["artifacts"]["student.int8.onnx"]["verdict"] == "PASS"


def test_an_artifact_that_is_new_is_not_gated(judged_run: RunFolder, finished_run: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "baseline.npz"
    assert run_command("baseline", finished_run.path, "-o", file, "--quiet").code == 0
    report = verified(judged_run.path, "--baseline", file)
    assert report["verdict"] == report["artifacts"]["student.fp16.onnx"]["verdict"] == "NOT GATED"
    assert report["baseline"]["new"] == ["student.fp16.onnx"]
    assert report["artifacts"]["student.onnx"]["verdict"] == "PASS"


def test_labels_on_one_side_alone_are_noted(
    judged_run: RunFolder, baseline: Path, digits_data: Path, tmp_path: Path
) -> None:
    artifact = (judged_run.artifacts / "student.onnx", "--samples", judged_run.samples)
    report = verified(*artifact, "--baseline", baseline)
    assert checks_of(report["artifacts"]["student.onnx"], "D") == {"drop": "PASS"}
    assert report["baseline"]["data"] is None
    assert any("pass --data" in note for note in report["notes"])
    file = tmp_path / "without.npz"
    assert run_command("baseline", judged_run.path, "-o", file, "--quiet").code == 0
    report = verified(*artifact, "--baseline", file, "--data", digits_data)
    assert any("made without --data" in note for note in report["notes"])


def test_an_artifact_that_the_baseline_does_not_know_is_missing_in_it(
    judged_run: RunFolder, baseline: Path, workplace: Path
) -> None:
    shutil.copy(judged_run.artifacts / "student.onnx", "renamed.onnx")
    outcome = run_command("verify", "renamed.onnx", "--samples", judged_run.samples, "--baseline", baseline)
    assert (outcome.code, outcome.out) == (4, "")
    assert "does not hold renamed.onnx" in outcome.errors[0]
    assert "student.fp16.onnx" in outcome.hints[0]


def test_distil_holds_its_student_against_a_baseline(
    digits_teacher: Path, baseline: Path, digits_data: Path, workplace: Path
) -> None:
    flags = ("--baseline", baseline, "--max-drop", 0.02, "--data", digits_data, "--min-accuracy", 0.9)
    outcome = run_command(
        *("distill", digits_teacher, "--student", QUICK_STUDENT, *settings(ONE_STEP), "-e", "onnx", "--out", "run"),
        *(*flags, "--junit", "junit.xml", "--json"),
    )
    assert outcome.code == 3, outcome.err
    report = json.loads(outcome.out)
    assert checks_of(report["student"], "D")["drop"] == "FAIL"
    assert checks_of(report["student"], "E") == {"accuracy": "FAIL"}
    recipe = dfadc.load_recipe("run/recipe.toml")
    assert (recipe.verify.max_baseline_drop, recipe.verify.min_accuracy) == (0.02, 0.9)
    failures = ET.parse("junit.xml").getroot().get("failures")  # noqa: S314
    assert int(str(failures)) > 0
