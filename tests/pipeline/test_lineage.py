"""Student, samples and artifacts of a run belong together: files of another run, damaged or unknown ones are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from command_line import files_of, run_command
from judged_runs import checks_of, classes_of, copy_of, verified
from onnx import helper

from dfadc.pipeline.export import ExportObserver, export_student
from dfadc.storage import sha256_file
from dfadc.verification.baseline import Baseline
from dfadc.verification.samples import SampleSet
from exporters.manifest import Manifest

if TYPE_CHECKING:
    from dfadc.run_folder import RunFolder
    from exporters.exporter import ExportResult

QUICK_BENCH = ("--seconds", 0.02, "--threads", 1, "--batch", 2)
#: Switches comparison A off.
WITHOUT_A = ("--set", "verify.compare_export=false")


@pytest.fixture
def run(judged_run: RunFolder, tmp_path: Path) -> RunFolder:
    return copy_of(judged_run, tmp_path / "run")


def without_record(run: RunFolder) -> None:
    """Makes the samples those of an earlier version, which recorded no student."""
    samples = SampleSet.load(run.samples)
    provenance = {key: value for key, value in samples.provenance.items() if not key.endswith("_sha256")}
    assert len(provenance) == len(samples.provenance) - 2
    replace(samples, provenance=provenance).save(run.samples)


def change_onnx(run: RunFolder, name: str, change: Any) -> None:
    """Changes an artifact and its record, as if it had been exported so."""
    path = run.artifacts / name
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    manifest = Manifest.read(run.path)
    record = manifest.find(f"artifacts/{name}")
    assert record is not None
    manifest.add(replace(record, sha256=sha256_file(path))).write(run.path)


def drop_metadata(model: onnx.ModelProto, *names: str) -> None:
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key.removeprefix("dfadc.") not in names}
    del model.metadata_props[:]
    helper.set_model_props(model, kept)


# The student


@pytest.mark.parametrize("fault", ["swapped", "damaged", "samples swapped"])
def test_another_student_than_the_samples_is_refused_by_every_command(
    fault: str, run: RunFolder, worse_run: RunFolder, baseline: Path, tmp_path: Path
) -> None:
    if fault == "swapped":
        shutil.copy(worse_run.student, run.student)
    elif fault == "samples swapped":
        shutil.copy(worse_run.samples, run.samples)
    else:
        data = bytearray(run.student.read_bytes())
        data[-3] ^= 0x40  # of a weight: a sound file all the same
        run.student.write_bytes(data)
    before = files_of(tmp_path)
    for command, *flags in (
        ("verify",),
        ("verify", "--baseline", baseline),
        ("export", "-e", "onnx"),
        ("export", "-e", "kit"),
        ("baseline", "-o", tmp_path / "new.npz"),
        ("bench", *QUICK_BENCH),
    ):
        outcome = run_command(command, run.path, *flags)
        assert outcome.code == 2, (command, outcome.err)
        assert f"{run.student} is not the student whose answers {run.samples} holds" in outcome.errors[0]
        assert outcome.hints
    assert files_of(tmp_path) == before


def test_a_run_of_an_earlier_version_is_noted_and_its_student_really_answers(
    run: RunFolder, worse_run: RunFolder, baseline: Path, tmp_path: Path
) -> None:
    without_record(run)
    note = "samples.npz does not record whose answers it holds: student.safetensors may be another student"
    report = verified(run.path)
    assert report["verdict"] == "PASS"
    assert note in report["notes"]
    # Its artifacts do say whose they are.
    shutil.copy(worse_run.student, run.student)
    outcome = run_command("verify", run.path)
    assert outcome.code == 2
    assert "student.onnx was made of another student" in outcome.errors[0]
    # Without artifacts nothing tells, but the student's answers of today do.
    Manifest().write(run.path)
    shutil.rmtree(run.artifacts)
    report = verified(run.path, "--baseline", baseline, code=3)
    assert checks_of(report["student"], "D") == {"drop": "FAIL"}
    file = tmp_path / "new.npz"
    outcome = run_command("baseline", run.path, "-o", file, "--json")
    assert outcome.code == 0, outcome.err
    assert note in json.loads(outcome.out)["notes"]
    today = classes_of(worse_run.artifacts / "student.onnx", SampleSet.load(run.samples))
    np.testing.assert_array_equal(Baseline.load(file).predictions["student"], today)


@pytest.mark.parametrize("says", ["its student", "its parent"])
def test_an_artifact_of_another_student_is_refused(
    says: str, run: RunFolder, worse_run: RunFolder, tmp_path: Path
) -> None:
    """Also one that only names the artifact that it was made of, as those of earlier versions do."""
    if says == "its parent":
        change_onnx(run, "student.fp16.onnx", lambda model: drop_metadata(model, "student_sha256"))
        assert verified(run.path)["verdict"] == "PASS"
    (other,) = Manifest.read(worse_run.path).artifacts
    shutil.copy(worse_run.path / other.file, run.artifacts / "other.onnx")
    other = replace(other, file="artifacts/other.onnx")
    manifest = Manifest.read(run.path)
    first, half = manifest.artifacts
    if says == "its parent":
        Manifest((first, replace(half, parent_sha256=other.sha256), other)).write(run.path)
    else:
        manifest.add(other).write(run.path)
    name = "student.fp16.onnx" if says == "its parent" else "other.onnx"
    for command, *flags in (("verify",), ("baseline", "-o", tmp_path / "b.npz"), ("bench", *QUICK_BENCH)):
        outcome = run_command(command, run.path, *flags)
        assert outcome.code == 2, outcome.out
        assert f"{name} was made of another student" in outcome.errors[0]


# The manifest


def test_artifacts_of_no_manifest_are_not_run_and_counted(run: RunFolder, tmp_path: Path) -> None:
    (run.path / "manifest.json").unlink()
    (run.artifacts / "remarks.txt").write_text("no artifact")
    report = verified(run.path)
    assert report["headline"] == "PASS: 0 of 2 artifacts ran"
    for name in ("student.onnx", "student.fp16.onnx"):
        assert report["artifacts"][name]["verdict"] == "NOT RUN"
        assert "in no manifest" in report["artifacts"][name]["reasons"][0]
    (note,) = (note for note in report["notes"] if "manifest" in note)
    assert note.startswith("2 files are in no manifest: student.fp16.onnx, student.onnx;")
    report = verified(run.path, "--require", "student.onnx", code=4)
    assert report["reasons"] == ["required but NOT RUN: student.onnx"]
    outcome = run_command("baseline", run.path, "-o", tmp_path / "b.npz", "--json")
    assert set(json.loads(outcome.out)["left_out"]) == {"student.onnx", "student.fp16.onnx"}


@pytest.mark.parametrize("content", ["", "{", '{"schema": 1, "artifacts": [{"file": "x"}]}'])
def test_an_export_replaces_a_damaged_manifest(content: str, run: RunFolder) -> None:
    (run.path / "manifest.json").write_text(content)
    assert run_command("verify", run.path).code == 2
    outcome = run_command("export", run.path, "-e", "onnx")
    assert outcome.code == 0, outcome.err
    report = verified(run.path)
    verdicts = {name: entry["verdict"] for name, entry in report["artifacts"].items()}
    assert verdicts == {"student.onnx": "PASS", "student.fp16.onnx": "NOT RUN"}


def test_a_manifest_of_a_later_version_is_not_replaced(run: RunFolder) -> None:
    path = run.path / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    before = files_of(run.path)
    outcome = run_command("export", run.path, "-e", "onnx")
    assert (outcome.code, files_of(run.path)) == (2, before)
    assert "has schema 2" in outcome.errors[0]


def test_an_export_keeps_what_the_manifest_has_got_meanwhile(run: RunFolder) -> None:
    """Where the file system knows no locks, another export may have written it."""

    def write_another(result: ExportResult) -> None:
        manifest = Manifest.read(run.path)
        if result.path.name == "student.onnx":  # the first of the two
            manifest.add(replace(manifest.artifacts[0], file="artifacts/of_another.onnx")).write(run.path)

    export_student(run, ["onnx", "onnx:fp16"], observer=ExportObserver(on_result=write_another))
    assert {Path(record.file).name for record in Manifest.read(run.path).artifacts} == {
        *("student.onnx", "student.fp16.onnx", "of_another.onnx")
    }


# What a runtime does not take


def _operator(domain: str) -> Any:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Relu")
        node.op_type, node.domain = "Unheard", domain
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return change


REFUSED = {
    "operator of somebody": _operator("of.somebody"),
    "operator of a later opset": _operator(""),
    "IR version": lambda model: setattr(model, "ir_version", 99),
    "opset": lambda model: setattr(model.opset_import[0], "version", 99),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_runtime_here_does_not_load_is_not_run_and_the_others_are_judged(
    what: str, run: RunFolder, tmp_path: Path
) -> None:
    change_onnx(run, "student.fp16.onnx", REFUSED[what])
    report = verified(run.path)
    assert report["headline"] == "PASS: 1 of 2 artifacts ran"
    assert report["artifacts"]["student.onnx"]["verdict"] == "PASS"
    entry = report["artifacts"]["student.fp16.onnx"]
    assert entry["verdict"] == "NOT RUN"
    assert "ONNX Runtime cannot load" in entry["reasons"][0]
    assert verified(run.path, "--require", "student.fp16.onnx", code=4)["exit_code"] == 4
    alone = verified(run.artifacts / "student.fp16.onnx", "--samples", run.samples, code=4)
    assert alone["artifacts"]["student.fp16.onnx"]["verdict"] == "NOT RUN"
    timed = run_command("bench", run.path, *QUICK_BENCH, "--json")
    assert timed.code == 0, timed.err
    assert "cannot load" in json.loads(timed.out)["networks"]["student.fp16.onnx"]["not_run"]
    frozen = run_command("baseline", run.path, "-o", tmp_path / "b.npz", "--json")
    assert frozen.code == 0, frozen.err
    assert set(json.loads(frozen.out)["left_out"]) == {"student.fp16.onnx"}


@pytest.mark.parametrize("fault", ["edited", "gone", "cut"])
def test_a_damaged_artifact_fails_and_the_others_are_judged(fault: str, run: RunFolder) -> None:
    path = run.artifacts / "student.fp16.onnx"
    data = path.read_bytes()
    path.unlink()
    if fault != "gone":
        path.write_bytes(data[:-1] + b"!" if fault == "edited" else data[: len(data) // 2])
    report = verified(run.path, code=3)
    assert report["reasons"] == ["failed: student.fp16.onnx"]
    assert report["artifacts"]["student.onnx"]["verdict"] == "PASS"
    (reason,) = report["artifacts"]["student.fp16.onnx"]["reasons"]
    assert ("cannot be read" if fault == "gone" else "is not the file that was exported") in reason


# Samples of another student


def test_samples_of_another_student_are_refused_where_comparison_a_has_limits(
    worse_run: RunFolder, judged_run: RunFolder
) -> None:
    artifact = worse_run.artifacts / "student.onnx"
    outcome = run_command("verify", artifact, "--samples", judged_run.samples)
    assert (outcome.code, outcome.out) == (2, "")
    assert "samples of another student" in outcome.errors[0]
    assert " ".join(WITHOUT_A) in outcome.hints[0]


@pytest.mark.parametrize(("min_agreement", "code"), [(0.01, 0), (0.999, 3)])
def test_on_samples_of_another_student_an_artifact_is_judged_beside_the_teacher(
    min_agreement: float, code: int, worse_run: RunFolder, judged_run: RunFolder
) -> None:
    artifact = worse_run.artifacts / "student.onnx"
    flags = ("--samples", judged_run.samples, *WITHOUT_A, "--min-agreement", min_agreement)
    report = verified(artifact, *flags, code=code)
    entry = report["artifacts"]["student.onnx"]
    assert entry["verdict"] == ("FAIL" if code else "NOT GATED")
    assert entry["comparisons"]["A"] == {}
    assert checks_of(entry, "A") == {"export": "NOT GATED"}
    assert checks_of(entry, "B") == {"agreement": "FAIL" if code else "PASS"}
    samples = SampleSet.load(judged_run.samples)
    gated = np.array(samples.sources)[samples.source] == report["gate"]["source"]
    agrees = classes_of(artifact, samples) == samples.teacher_logits.argmax(1)
    assert entry["agreement"] == pytest.approx(agrees[gated].mean())
    # The student that answered the samples is not that of the artifact.
    assert (report["student"]["verdict"], report["student"]["agreement"]) == ("NOT RUN", None)
    assert any("samples of another student" in note for note in report["notes"])


def test_samples_of_another_teacher_are_refused(run: RunFolder) -> None:
    samples = SampleSet.load(run.samples)
    replace(samples, provenance={**samples.provenance, "teacher_sha256": "0" * 64}).save(run.samples)
    outcome = run_command("verify", run.artifacts / "student.onnx", "--samples", run.samples)
    assert outcome.code == 2
    assert "samples of another teacher" in outcome.errors[0]


def test_samples_of_an_earlier_version_are_noted(run: RunFolder) -> None:
    artifact = (run.artifacts / "student.onnx", "--samples", run.samples)
    assert verified(*artifact)["notes"] == []
    without_record(run)
    report = verified(*artifact)
    assert report["artifacts"]["student.onnx"]["verdict"] == "PASS"
    (note,) = report["notes"]
    assert note.startswith("samples.npz does not record its student")
