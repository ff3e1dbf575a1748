"""Baselines, gates and what CI is told, by the commands a person or a job types."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import ROOT, command_process, files_of, finish_command, run_command, settings
from conftest import QUICK_RECIPE, QUICK_STUDENT
from onnx import numpy_helper
from PIL import Image
from scipy import stats

import dfadc
from dfadc.api.gates import gate_thresholds
from dfadc.contract import ImageContract
from dfadc.run import RunFolder
from dfadc.verification.baseline import Baseline
from dfadc.verification.gate import Thresholds
from dfadc.verification.samples import SampleSet

if TYPE_CHECKING:
    from command_line import Outcome

NO_TORCH = "sys.modules['torch'] = None"
ONE_STEP = {**QUICK_RECIPE, "steps": 1}


@pytest.fixture(scope="module")
def run(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The finished run with an fp16 artifact besides."""
    folder = tmp_path_factory.mktemp("baseline") / "run"
    shutil.copytree(finished_run.path, folder)
    assert run_command("export", folder, "-e", "onnx:fp16", "--quiet").code == 0
    copy = RunFolder(folder)
    # So few samples cannot show the 99.5 % that fp16 is held to.
    text = copy.recipe.read_text()
    copy.recipe.write_text(text.replace("min_fp16_agreement = 0.995", "min_fp16_agreement = 0.9"))
    assert copy.recipe.read_text() != text
    return copy


@pytest.fixture(scope="module")
def frozen(run: RunFolder, digits_data: Path) -> tuple[Path, Outcome]:
    """Its baseline, and what the command printed."""
    file = run.path.parent / "baseline.npz"
    return file, run_command("baseline", run.path, "-o", file, "--data", digits_data, "--json")


@pytest.fixture
def baseline(frozen: tuple[Path, Outcome]) -> Path:
    """The file alone."""
    return frozen[0]


@pytest.fixture(scope="module")
def worse(digits_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A few steps of the same teacher: a student that knows little, and yet does not answer one class only."""
    recipe = dfadc.load_recipe("auto", [f"{path}={value}" for path, value in {**QUICK_RECIPE, "steps": 8}.items()])
    folder = dfadc.run_distillation(
        digits_teacher, QUICK_STUDENT, out=tmp_path_factory.mktemp("worse") / "run", recipe=recipe
    )
    dfadc.export_student(folder, ["onnx"])
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copy_of(folder: RunFolder, path: Path) -> RunFolder:
    shutil.copytree(folder.path, path)
    return RunFolder(path)


def verified(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The report that `dfadc verify --json` prints; it fits the schema whatever its verdict."""
    outcome = run_command("verify", *arguments, "--json")
    assert outcome.code == code, outcome.err + outcome.out
    report: dict[str, Any] = json.loads(outcome.out)
    schema = json.loads((ROOT / "dfadc" / "verification" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(report)
    assert report["exit_code"] == code
    return report


def classes_of(artifact: Path, samples: SampleSet) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(artifact)
    (logits,) = session.run(None, {session.get_inputs()[0].name: samples.normalised()})
    classes: np.ndarray[Any, Any] = np.asarray(logits).argmax(1)
    return classes


def fair_coin(lost: int, gained: int) -> float:
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def checks_of(entry: dict[str, Any], comparison: str) -> dict[str, str]:
    return {check["gate"]: check["verdict"] for check in entry["checks"] if check["comparison"] == comparison}


# The baseline


def test_a_baseline_holds_what_every_network_answers(run: RunFolder, frozen: tuple[Path, Outcome]) -> None:
    file, outcome = frozen
    assert outcome.code == 0, outcome.err
    known, samples = Baseline.load(file), SampleSet.load(run.samples)
    assert list(known.predictions) == ["student", "student.onnx", "student.fp16.onnx"]
    assert known.teacher_sha256 == run.record()["teacher"]["sha256"]
    assert known.samples.sha256 == samples.sha256
    for name in ("student.onnx", "student.fp16.onnx"):
        np.testing.assert_array_equal(known.predictions[name], classes_of(run.artifacts / name, samples))
    printed = json.loads(outcome.out)
    teacher = samples.teacher_logits.argmax(1)
    for name, rates in printed["networks"].items():
        assert rates["agreement"] == pytest.approx((known.predictions[name] == teacher).mean())
    assert printed["data"]["n"] == 397
    assert f"baseline: {file}" in outcome.err


def test_its_labelled_results_are_the_accuracy(
    frozen: tuple[Path, Outcome], command_run: tuple[RunFolder, Outcome]
) -> None:
    """That of the same student, which another command measured."""
    printed, report = json.loads(frozen[1].out), json.loads(command_run[1].out)
    assert printed["networks"]["student"]["accuracy"] == pytest.approx(report["accuracy"]["student"])
    assert printed["networks"]["student.onnx"]["accuracy"] == pytest.approx(report["accuracy"]["student"])


def test_a_baseline_is_not_replaced_unasked(run: RunFolder, workplace: Path) -> None:
    assert run_command("baseline", run.path, "-o", "b.npz").code == 0
    before = files_of(workplace)
    outcome = run_command("baseline", run.path, "-o", "b.npz")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--force" in outcome.hints[0]
    assert files_of(workplace) == before
    assert run_command("baseline", run.path, "-o", "b.npz", "--force").code == 0
    assert files_of(workplace) == before


def test_a_run_is_no_worse_than_itself(run: RunFolder, baseline: Path, digits_data: Path) -> None:
    report = verified(run.path, "--baseline", baseline, "--data", digits_data)
    assert report["verdict"] == "PASS"
    for entry in (report["student"], *report["artifacts"].values()):
        assert checks_of(entry, "D") == {"drop": "PASS", "accuracy drop": "PASS"}
    compared = report["baseline"]
    assert (compared["missing"], compared["new"]) == ([], [])
    assert compared["data"]["n"] == 397
    assert "adversary" not in compared["gated_sources"]
    for pairs in compared["networks"]["student.fp16.onnx"]["agreement"].values():
        assert (pairs["lost"], pairs["gained"], pairs["p_value"]) == (0, 0, 1)
    assert "## D baseline (run, on its own samples)" in run.report_md.read_text()


def test_a_worse_student_fails_on_the_baselines_samples(
    worse: RunFolder, run: RunFolder, baseline: Path, digits_data: Path, tmp_path: Path
) -> None:
    """Counted here once more, from the files and by scipy."""
    candidate = copy_of(worse, tmp_path / "candidate")
    report = verified(candidate.path, "--baseline", baseline, "--data", digits_data, code=3)
    samples = SampleSet.load(run.samples)
    teacher = samples.teacher_logits.argmax(1)
    assert len(set(classes_of(candidate.artifacts / "student.onnx", samples))) > 1  # else any samples would do
    right_before = classes_of(run.artifacts / "student.onnx", samples) == teacher
    right_now = classes_of(candidate.artifacts / "student.onnx", samples) == teacher
    drawn_by = np.array(samples.sources)[samples.source]
    parts = {"gated": drawn_by != "adversary", **{name: drawn_by == name for name in samples.sources}}
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


def test_how_much_may_be_lost_is_asked_for(worse: RunFolder, baseline: Path) -> None:
    for flags, verdict, max_drop in (
        ((), "FAIL", 0.01),
        (("--max-drop", 1), "PASS", 1),
        (("--set", "verify.max_baseline_drop=1.0"), "PASS", 1),
        (("--set", "verify.max_baseline_drop=off"), "NOT GATED", None),
    ):
        artifact = (worse.artifacts / "student.onnx", "--samples", worse.samples, "--min-agreement", 1)
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
    assert "the baseline knows student.fp16.onnx, which did not run" in report["notes"]


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
    monkeypatch.setitem(sys.modules, "openvino", None)
    for arguments in ((candidate.path, "--baseline", file), alone):
        report = verified(*arguments, code=4)
        assert report["artifacts"][name]["verdict"] == "NOT RUN"
        assert report["reasons"] == [f"required but NOT RUN: {name}"]


def test_an_artifact_that_is_new_is_not_gated(run: RunFolder, finished_run: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "baseline.npz"
    assert run_command("baseline", finished_run.path, "-o", file, "--quiet").code == 0
    report = verified(run.path, "--baseline", file)
    assert report["verdict"] == report["artifacts"]["student.fp16.onnx"]["verdict"] == "NOT GATED"
    assert report["baseline"]["new"] == ["student.fp16.onnx"]
    assert report["artifacts"]["student.onnx"]["verdict"] == "PASS"


def test_labels_on_one_side_alone_are_noted(run: RunFolder, baseline: Path, digits_data: Path, tmp_path: Path) -> None:
    artifact = (run.artifacts / "student.onnx", "--samples", run.samples)
    report = verified(*artifact, "--baseline", baseline)
    assert checks_of(report["artifacts"]["student.onnx"], "D") == {"drop": "PASS"}
    assert report["baseline"]["data"] is None
    assert any("pass --data" in note for note in report["notes"])
    file = tmp_path / "without.npz"
    assert run_command("baseline", run.path, "-o", file, "--quiet").code == 0
    report = verified(*artifact, "--baseline", file, "--data", digits_data)
    assert any("made without --data" in note for note in report["notes"])


# One artifact


def test_one_artifact_needs_neither_torch_nor_its_run(run: RunFolder, baseline: Path, digits_data: Path) -> None:
    """Its gates are those of the recipe beside the samples: auto's would fail this student."""
    artifact = run.artifacts / "student.fp16.onnx"
    flags = ("--samples", run.samples, "--baseline", baseline, "--data", digits_data, "--junit", run.path / "junit.xml")
    with command_process("verify", artifact, *flags, "--json", preamble=NO_TORCH) as process:
        outcome = finish_command(process)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["gate"]["min_agreement"] == QUICK_RECIPE["verify.min_agreement"]
    (entry,) = report["artifacts"].values()
    assert checks_of(entry, "D") == {"drop": "PASS", "accuracy drop": "PASS"}
    assert report["baseline"]["missing"] == []
    assert report["baseline"]["data"]["n"] == 397


def test_samples_that_lie_alone_are_judged_by_the_recipe_that_is_named(run: RunFolder, workplace: Path) -> None:
    artifact = run.artifacts / "student.onnx"
    shutil.copy(run.samples, "samples.npz")
    report = json.loads(run_command("verify", artifact, "--samples", "samples.npz", "--json").out)
    assert report["gate"]["min_agreement"] == dfadc.load_recipe("auto").verify.min_agreement
    assert "gates of recipe auto: no recipe.toml lies beside samples.npz, and none was named" in report["notes"]
    assert verified(artifact, "--samples", "samples.npz", "--recipe", run.recipe)["notes"] == []
    Path("strict.toml").write_text("[verify]\nmin_agreement = 1.0\n", encoding="utf-8")
    assert verified(artifact, "--samples", "samples.npz", "--recipe", "strict.toml", code=3)["notes"] == []


def test_one_artifact_is_judged_as_what_it_is_or_is_said_to_be(run: RunFolder) -> None:
    arguments = (run.artifacts / "student.fp16.onnx", "--samples", run.samples)
    assert set(checks_of(verified(*arguments)["artifacts"]["student.fp16.onnx"], "A")) == {"agreement", "sqnr"}
    report = verified(*arguments, "--precision", "fp32", code=3)
    assert checks_of(report["artifacts"]["student.fp16.onnx"], "A")["logit error"] == "FAIL"


def test_an_artifact_that_the_baseline_does_not_know_is_missing_in_it(
    run: RunFolder, baseline: Path, workplace: Path
) -> None:
    shutil.copy(run.artifacts / "student.onnx", "renamed.onnx")
    outcome = run_command("verify", "renamed.onnx", "--samples", run.samples, "--baseline", baseline)
    assert (outcome.code, outcome.out) == (4, "")
    assert "does not know renamed.onnx" in outcome.errors[0]
    assert "student.fp16.onnx" in outcome.hints[0]


def test_nan_fails(run: RunFolder, baseline: Path, workplace: Path) -> None:
    model = onnx.load(run.artifacts / "student.onnx")
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(np.nan), weight.name))
    onnx.save(model, "student.onnx")
    report = verified("student.onnx", "--samples", run.samples, "--baseline", baseline, code=3)
    entry = report["artifacts"]["student.onnx"]
    assert checks_of(entry, "A") == checks_of(entry, "D") == {"finite": "FAIL"}


def test_no_samples_fail(run: RunFolder, tmp_path: Path) -> None:
    candidate = copy_of(run, tmp_path / "candidate")
    samples = SampleSet.load(run.samples)
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


def test_the_accuracy_is_gated_by_its_lower_bound(run: RunFolder, digits_data: Path) -> None:
    alone = (run.artifacts / "student.onnx", "--samples", run.samples, "--data", digits_data)
    measured = verified(*alone)["artifacts"]["student.onnx"]
    held = verified(*alone, "--min-accuracy", measured["accuracy_low"] - 0.01)
    assert held["verdict"] == "PASS"
    assert checks_of(held["artifacts"]["student.onnx"], "E") == {"accuracy": "PASS"}
    assert checks_of(held["student"], "E") == {}  # it is not here, only its answers are
    failed = verified(run.path, "--data", digits_data, "--min-accuracy", measured["accuracy"], code=3)
    for entry in (failed["student"], *failed["artifacts"].values()):
        assert checks_of(entry, "E") == {"accuracy": "FAIL"}


def test_a_gate_of_the_recipe_that_needs_labels_does_not_go_without(
    run: RunFolder, digits_data: Path, tmp_path: Path
) -> None:
    candidate = copy_of(run, tmp_path / "candidate")
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


def test_every_gate_of_the_recipe_can_be_set(run: RunFolder) -> None:
    flags = settings(
        {"verify.min_fp16_agreement": 1.0, "verify.min_class_agreement": 0.01, "verify.min_coverage": "off"}
    )
    artifact = (run.artifacts / "student.fp16.onnx", "--samples", run.samples)
    report = verified(*artifact, *flags, code=3)
    assert checks_of(report["artifacts"]["student.fp16.onnx"], "A")["agreement"] == "FAIL"
    assert "class agreement" in checks_of(report["student"], "B")
    assert checks_of(report["student"], "C") == {"coverage": "NOT GATED"}
    assert report["gate"]["export"]["fp16"]["min_agreement"] == 1


# What CI is told


def test_junit_is_written_and_says_what_the_report_says(run: RunFolder, workplace: Path) -> None:
    verify = ("verify", run.artifacts / "student.onnx", "--samples", run.samples, "--junit", "out/junit.xml")
    assert run_command(*verify).code == 0
    root = ET.parse("out/junit.xml").getroot()  # noqa: S314 -- written a line above
    assert root.get("failures") == root.get("errors") == "0"
    assert [suite.get("name") for suite in root] == ["fp32 student", "student.onnx", "required"]
    assert run_command(*verify, "--require", "no.onnx").code == 4
    assert ET.parse("out/junit.xml").getroot().get("failures") == "1"  # noqa: S314
    # Nothing of an earlier job is left where a later one does not come to its end.
    assert run_command(*verify, "--baseline", "nowhere.npz").code == 4
    root = ET.parse("out/junit.xml").getroot()  # noqa: S314
    (error,) = root.iter("error")
    assert error.get("message") == "there is no baseline nowhere.npz"


@pytest.mark.parametrize("path", ["a_file/junit.xml", "a_folder"])
def test_junit_that_cannot_be_written_is_known_before_any_work(
    path: str, run: RunFolder, digits_teacher: Path, workplace: Path
) -> None:
    Path("a_file").touch()
    Path("a_folder").mkdir()
    before = files_of(run.path)
    for command in (("verify", run.path), ("distill", digits_teacher, "--out", "new")):
        outcome = run_command(*command, "--junit", path)
        assert (outcome.code, outcome.out) == (7, ""), outcome.err
        assert path in outcome.errors[0]
        assert "--junit" in outcome.hints[0]
    assert files_of(run.path) == before
    assert not Path("new").exists()


def test_github_gets_a_summary_and_annotations_and_stdout_stays_json(
    run: RunFolder, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("summary.md").write_text("of an earlier step\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    verify = ("verify", run.artifacts / "student.onnx", "--samples", run.samples)
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


def test_elsewhere_nothing_is_annotated(run: RunFolder, workplace: Path) -> None:
    outcome = run_command("verify", run.artifacts / "student.onnx", "--samples", run.samples, "--min-agreement", 1)
    assert outcome.code == 3
    assert "::" not in outcome.err
    assert files_of(workplace) == {}


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


# Bad input


def refused(*arguments: object, code: int = 2, says: str, hint: str = "") -> None:
    outcome = run_command(*arguments)
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert says in outcome.errors[0]
    assert hint in "".join(outcome.hints)


def test_a_baseline_that_is_not_there(run: RunFolder, digits_teacher: Path, workplace: Path) -> None:
    for command in (
        ("verify", run.path),
        ("verify", run.artifacts / "student.onnx", "--samples", run.samples),
        ("distill", digits_teacher, "--student", QUICK_STUDENT),
    ):
        refused(*command, "--baseline", "nowhere.npz", code=4, says="no baseline nowhere.npz", hint="dfadc baseline")
    assert files_of(workplace) == {}


def test_a_baseline_of_something_else(run: RunFolder, baseline: Path, digits_teacher: Path, workplace: Path) -> None:
    known = Baseline.load(baseline)
    replace(known, teacher_sha256="00" * 32).save(Path("teacher.npz"))
    known.samples.save(Path("schema.npz"))
    few = replace(
        known.samples,
        contract=ImageContract((1, 8, 8), 4, mean=(0.305,), std=(0.376,)),
        teacher_logits=np.eye(4, dtype=np.float32)[np.arange(len(known.samples)) % 4],
        student_logits=np.eye(4, dtype=np.float32)[np.arange(len(known.samples)) % 4],
    )
    classes = (np.arange(len(few)) % 4).astype(np.int32)
    Baseline("four", known.teacher_sha256, few, {"student": classes, "student.onnx": classes}).save(Path("classes.npz"))
    artifact = ("verify", run.artifacts / "student.onnx", "--samples", run.samples)
    distil = ("distill", digits_teacher, "--student", QUICK_STUDENT, "--steps", 1)
    for command in (("verify", run.path), artifact, distil):
        refused(*command, "--baseline", "teacher.npz", says="another teacher")
        refused(*command, "--baseline", "schema.npz", says="this version reads 'dfadc.baseline/1'")
        refused(*command, "--baseline", "classes.npz", says="has 4 classes, here are 10")
    assert not Path("runs").exists()


def test_samples_that_are_not_the_hashed_ones(run: RunFolder, baseline: Path, workplace: Path) -> None:
    for file, command in (
        (run.samples, ("verify", run.artifacts / "student.onnx", "--samples", "changed.npz")),
        (baseline, ("verify", run.path, "--baseline", "changed.npz")),
    ):
        with np.load(file) as archive:
            content = dict(archive)
        content["images"][0, 0, 0, 0] ^= 1
        np.savez("changed.npz", **content)
        refused(*command, says="the file was frozen with")


def test_other_labelled_images_than_the_baselines(
    run: RunFolder, baseline: Path, digits_data: Path, workplace: Path
) -> None:
    with np.load(digits_data) as data:
        np.savez("fewer.npz", images=data["images"][:-1], labels=data["labels"][:-1])
        np.savez("shuffled.npz", images=data["images"][::-1], labels=data["labels"][::-1])
    for other in ("fewer.npz", "shuffled.npz"):
        refused("verify", run.path, "--baseline", baseline, "--data", other, says="other images or labels", hint="anew")


@pytest.mark.parametrize("command", ["verify", "baseline"])
@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (np.zeros((4, 3, 8, 8), np.uint8), np.arange(4), "3 channel(s), the teacher takes 1"),
        (np.zeros((4, 1, 9, 9), np.uint8), np.arange(4), "images are 9×9, the teacher takes 8×8"),
        (np.zeros((4, 1, 8, 8), np.uint8), np.arange(4) + 7, "labels run from 7 to 10"),
        (np.zeros((4, 1, 8, 8), np.uint8), -np.arange(4), "labels run from -3 to 0"),
        (np.zeros((0, 1, 8, 8), np.uint8), np.arange(0), "`images` is empty"),
    ],
    ids=["channels", "size", "labels", "negative", "empty"],
)
def test_labelled_images_that_do_not_fit(
    command: str, images: Any, labels: Any, says: str, run: RunFolder, workplace: Path
) -> None:
    np.savez("data.npz", images=images, labels=labels)
    arguments = ("-o", "b.npz") if command == "baseline" else ()
    refused(command, run.path, *arguments, "--data", "data.npz", says=says)
    assert not Path("b.npz").exists()


def test_images_that_cannot_be_read_are_counted_and_named(run: RunFolder, workplace: Path) -> None:
    for label in range(10):
        Path(f"data/{label}").mkdir(parents=True)
        Image.new("L", (8, 8), 20 * label).save(f"data/{label}/whole.png")
    Path("data/3/empty.png").touch()
    Path("data/7/broken.png").write_bytes(b"no image")
    outcome = run_command("verify", run.artifacts / "student.onnx", "--samples", run.samples, "--data", "data")
    assert outcome.code == 0
    (skipped,) = (line for line in outcome.err.splitlines() if line.startswith("note: skipped"))
    assert "2 of 12 images" in skipped
    assert "3/empty.png" in skipped
    assert "7/broken.png" in skipped


@pytest.mark.parametrize(
    ("flags", "says", "hint"),
    [
        (("--min-accuracy", 0.9), "--min-accuracy 0.9 needs labelled images", "--data"),
        (("--max-drop", 0.1), "--max-drop 0.1 needs something to drop from", "--baseline"),
        (("--set", "steps=3"), "'steps=3' sets no gate", "verify.min_agreement"),
        (("--set", "verify.required=[]"), "'verify.required=[]' sets no gate", "verify.min_agreement"),
        (("--set", "verify.num_samples=3"), "'verify.num_samples=3' sets no gate", "verify.min_agreement"),
        (("--set", "verify.min_agreement=2"), "verify.min_agreement", ""),
        (("--recipe", "auto"), "--recipe goes with an artifact", "leave"),
        (("--precision", "int8", "--samples", "s.npz"), "--samples, --precision goes with an artifact", "leave"),
    ],
)
def test_flags_that_cannot_be(flags: tuple[object, ...], says: str, hint: str, run: RunFolder) -> None:
    refused("verify", run.path, *flags, says=says, hint=hint)


def test_flags_that_concern_no_artifact(run: RunFolder, digits_teacher: Path, workplace: Path) -> None:
    artifact = ("verify", run.artifacts / "student.onnx", "--samples", run.samples)
    refused(*artifact, "--trust-teacher", says="--trust-teacher goes with a run")
    refused(*artifact, "--recipe", "nowhere.toml", says="nowhere.toml")
    refused("distill", digits_teacher, "--dry-run", "--junit", "junit.xml", says="--dry-run verifies nothing")
    assert files_of(workplace) == {}
