"""An artifact that crashes its runtime fails; the command and the other artifacts go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from command_line import files_of, run_command
from crashing_model import write_crashing_model

from dfadc.errors import ExportFailed
from dfadc.pipeline.export import export_student
from dfadc.run_folder import RunFolder
from dfadc.storage import sha256_file
from exporters.manifest import Manifest
from exporters.sessions.open import check_runs

if TYPE_CHECKING:
    from pathlib import Path

CRASH = "the runtime crashed (signal 11) while opening student.fp16.onnx"


@pytest.fixture
def run_with_crash(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A run whose fp16 artifact crashes ONNX Runtime, as its manifest has it."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished_run.path, run.path)
    (result,) = export_student(run, ["onnx:fp16"])
    write_crashing_model(result.path)
    manifest = Manifest.read(run.path)
    record = manifest.find("artifacts/student.fp16.onnx")
    assert record is not None
    manifest.add(replace(record, sha256=sha256_file(result.path))).write(run.path)
    return run


def test_verify_fails_the_artifact_and_judges_the_others(run_with_crash: RunFolder, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    outcome = run_command("verify", run_with_crash.path, "--junit", junit, "--json")
    assert outcome.code == 3, outcome.err
    report = json.loads(outcome.out)
    assert report["exit_code"] == 3
    assert report["artifacts"]["student.onnx"]["verdict"] == "PASS"
    assert report["artifacts"]["student.fp16.onnx"]["verdict"] == "FAIL"
    assert report["artifacts"]["student.fp16.onnx"]["reasons"] == [f"A export: {CRASH}"]
    failures = {suite.attrib["name"]: suite.attrib["failures"] for suite in ET.parse(junit).iter("testsuite")}  # noqa: S314
    assert failures == {"verdict": "1", "fp32 student": "0", "student.onnx": "0", "student.fp16.onnx": "1"}
    assert CRASH in run_with_crash.report_html.read_text()


def test_one_artifact_alone_fails_too(run_with_crash: RunFolder) -> None:
    artifact = run_with_crash.artifacts / "student.fp16.onnx"
    outcome = run_command("verify", artifact, "--samples", run_with_crash.samples)
    assert outcome.code == 3, outcome.err
    assert CRASH in outcome.out


def test_bench_names_it_and_measures_the_others(run_with_crash: RunFolder) -> None:
    quick = ("--seconds", 0.02, "--threads", 1, "--batch", 2, "--json")
    outcome = run_command("bench", run_with_crash.path, *quick)
    assert outcome.code == 0, outcome.err
    networks = json.loads(outcome.out)["networks"]
    assert CRASH in networks["student.fp16.onnx"]["not_run"]
    assert networks["student.onnx"]["latency_ms"] > 0


def test_export_opens_what_it_writes(finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished_run.path, run.path)
    before = files_of(run.path)
    write_crashing_model(tmp_path / "crash.onnx")
    monkeypatch.setattr(
        "exporters.to_onnx.exporter.to_checked_bytes", lambda *_: (tmp_path / "crash.onnx").read_bytes()
    )
    outcome = run_command("export", run.path, "-e", "onnx:fp16")
    assert outcome.code == 5
    assert f"student.fp16.onnx was built and does not run: {CRASH}" in outcome.errors[0]
    assert files_of(run.path) == before


def test_what_a_runtime_refuses_is_no_export(finished_run: RunFolder, tmp_path: Path) -> None:
    damaged = tmp_path / "student.onnx"
    damaged.write_bytes((finished_run.artifacts / "student.onnx").read_bytes()[:-100])
    with pytest.raises(ExportFailed, match=r"student\.onnx was built and does not run: ONNX Runtime cannot load"):
        check_runs(damaged, (1, 8, 8))
