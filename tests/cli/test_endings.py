"""Every way in which `distill` and `verify` end: JSON, JUnit, summary, annotations, text and exit code agree."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree as ET

import pytest
import torch
from command_line import run_command
from conftest import DIGITS_CONTRACT, QUICK_STUDENT
from judged_runs import copy_of

import exporters.to_onnx.fp16  # noqa: F401 -- onnxruntime.transformers adds to sys.path once, which monkeypatch takes back
from dfadc.networks.names import build_architecture
from dfadc.run_folder import RunFolder
from exporters.manifest import Manifest

if TYPE_CHECKING:
    from command_line import Outcome

#: One step on next to nothing. Its student knows nothing: the gates that would say so are off unless a test is of them.
FEW = (
    "--steps 1 --batch-size 8 --set student.steps=1 --set verify.num_samples=64 "
    "--set calibration.num_images=16 --set compute.precision=fp32 --no-compile "
    "--out run --set verify.min_fp16_agreement=0.8 --set verify.min_int8_agreement=0.8"
)
GATES_OFF = "--set verify.min_agreement=off --set verify.min_coverage=off"
ARTIFACT_GATES_OFF = "--set verify.compare_export=false"
#: Weights of nothing: the student answers one class alone, and INT8 has nothing to calibrate with.
COLLAPSE = "--set student.weights=collapsed.pt --set student.optimizer.learning_rate=1e-9"
#: Trains and runs in torch; ONNX has no such operator.
NETWORK_THAT_ONNX_LACKS = """
import torch
from torch import nn

class Bessel(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, images):
        features = self.convolution(images).mean((2, 3))
        return self.head(features * torch.special.i0e(features))
"""


class Told(NamedTuple):
    """Everything that one command told: its output, and the files that CI reads."""

    outcome: Outcome
    junit: ET.Element
    summary: str

    @property
    def red(self) -> bool:
        return (self.junit.get("failures"), self.junit.get("errors")) != ("0", "0")

    @property
    def junit_messages(self) -> str:
        elements = (*self.junit.iter("failure"), *self.junit.iter("error"), *self.junit.iter("skipped"))
        return "\n".join(str(element.get("message")) for element in elements)

    @property
    def error_annotations(self) -> list[str]:
        return [line.replace("%25", "%") for line in self.outcome.err.splitlines() if line.startswith("::error ")]


@pytest.fixture
def tell(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command as a GitHub job does."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")

    def run(*arguments: object) -> Told:
        Path("summary.md").unlink(missing_ok=True)
        outcome = run_command(*arguments, "--junit", "junit.xml")
        return Told(outcome, ET.parse("junit.xml").getroot(), Path("summary.md").read_text())  # noqa: S314

    return run


def check_agreement(told: Told, report: dict[str, Any]) -> None:
    """Nothing that was told contradicts the report."""
    code, headline = report["exit_code"], report["headline"]
    assert told.outcome.code == code, told.outcome.err
    assert headline.startswith(report["verdict"])
    assert (code == 0) == (report["verdict"] in {"PASS", "NOT GATED"} or report["reasons"] == ["nothing was run"])
    assert told.red == (code != 0)
    assert (told.error_annotations != []) == (code != 0)
    assert told.summary.startswith(f"# Verification: {headline}\n")
    (said,) = (case.findtext("system-out") for case in told.junit.iter("testcase") if case.get("name") == "verdict")
    assert str(said).startswith(headline)
    for reason in report["reasons"]:
        assert reason in str(said)
        assert f"- {reason}" in told.summary.replace("\\|", "|")
        assert code == 0 or reason in told.error_annotations[0]


def verify_both_ways(tell: Any, *arguments: object) -> dict[str, Any]:
    """The report of a `verify`, which is printed as JSON and as text."""
    as_json, as_text = tell(*arguments, "--json"), tell(*arguments)
    report: dict[str, Any] = json.loads(as_json.outcome.out)
    for told in (as_json, as_text):
        check_agreement(told, report)
    assert as_text.outcome.out.splitlines()[-1] == f"verdict: {report['headline']}"
    for reason in report["reasons"]:
        assert reason in as_text.outcome.out
    return report


@pytest.mark.parametrize(
    ("flags", "headline", "code", "reasons"),
    [
        ("", "PASS", 0, []),
        ("--min-agreement 1", "FAIL", 3, ["failed: student, student.fp16.onnx, student.onnx"]),
        ("--require gone.onnx", "NOT RUN", 4, ["required but NOT RUN: gone.onnx"]),
        (
            "--min-agreement 1 --require gone.onnx",
            "FAIL",
            3,
            ["failed: student, student.fp16.onnx, student.onnx", "required but NOT RUN: gone.onnx"],
        ),
        (
            "--set verify.min_coverage=off",
            "NOT GATED",
            0,
            ["a gate is off or has nothing to compare with, for: student, student.fp16.onnx, student.onnx"],
        ),
    ],
)
def test_verify_ends(
    flags: str, headline: str, code: int, reasons: list[str], judged_run: RunFolder, tell: Any
) -> None:
    run = copy_of(judged_run, Path("run"))
    report = verify_both_ways(tell, "verify", run.path, *shlex.split(flags))
    assert (report["headline"], report["exit_code"], report["reasons"]) == (headline, code, reasons)
    assert json.loads(run.report_json.read_text())["exit_code"] == code
    assert headline in run.report_html.read_text()


def test_verify_ends_where_no_artifact_could_run(
    finished_run: RunFolder, tell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student passes, and no reader may take that for an artifact's pass."""
    pytest.importorskip("openvino")
    run = copy_of(finished_run, Path("run"))
    assert run_command("export", run.path, "-e", "openvino", "--quiet").code == 0
    engine, both = "student.openvino.xml", Manifest.read(run.path)
    Path("sitecustomize.py").write_text("import sys\nsys.modules['openvino'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))  # of the process that would open it
    report = verify_both_ways(tell, "verify", run.path)
    assert (report["headline"], report["exit_code"]) == ("PASS: 1 of 2 artifacts ran", 0)
    Manifest(tuple(known for known in both.artifacts if known.file == f"artifacts/{engine}")).write(run.path)
    (run.artifacts / "student.onnx").unlink()
    report = verify_both_ways(tell, "verify", run.path)
    assert (report["verdict"], report["headline"], report["exit_code"]) == ("PASS", "PASS: 0 of 1 artifacts ran", 0)
    told = tell("verify", run.path)
    assert "PASS: 0 of 1 artifacts ran" in told.junit_messages  # skipped, not passed
    assert "::warning title=verification%3A PASS%3A 0 of 1 artifacts ran::" in told.outcome.err
    for text in (told.summary, run.report_md.read_text(), run.report_html.read_text()):
        assert "PASS: 0 of 1 artifacts ran" in text
    report = verify_both_ways(tell, "verify", run.path, "--require", engine)
    assert (report["headline"], report["exit_code"]) == ("NOT RUN", 4)


def test_verify_ends_where_there_is_no_artifact(finished_run: RunFolder, tell: Any) -> None:
    run = copy_of(finished_run, Path("run"))
    shutil.rmtree(run.artifacts)
    (run.path / "manifest.json").unlink()
    report = verify_both_ways(tell, "verify", run.path)
    assert (report["headline"], report["exit_code"]) == ("PASS: there are no artifacts", 0)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        ("--baseline nowhere.npz", 4, "there is no baseline nowhere.npz"),
        ("--set verify.steps=3", 2, "sets no gate"),
        ("--data nowhere", 2, "nowhere"),
    ],
)
def test_verify_ends_before_there_is_a_report(
    flags: str, code: int, says: str, finished_run: RunFolder, tell: Any
) -> None:
    told = tell("verify", finished_run.path, *shlex.split(flags))
    assert_no_report(told, code, says)


def assert_no_report(told: Told, code: int, says: str) -> None:
    assert (told.outcome.code, told.outcome.out) == (code, "")
    assert (told.junit.get("errors"), told.junit.get("failures")) == ("1", "0")
    assert told.summary.startswith(f"# Verification: no verdict, exit code {code}\n")
    for text in (told.outcome.errors[0], told.junit_messages, told.summary, told.error_annotations[0]):
        assert says in text


def write_collapsed_weights(path: Path) -> None:
    """Of a student that answers class 3 whatever it sees."""
    network = build_architecture(QUICK_STUDENT, DIGITS_CONTRACT).module
    weights = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    weights[[*dict(network.named_parameters())][-1]][3] = 1
    torch.save(weights, path)


@pytest.mark.parametrize(
    ("flags", "headline", "code", "reasons"),
    [
        (f"{GATES_OFF} -e onnx", "NOT GATED", 0, ["a gate is off"]),
        ("--min-agreement 0.8 -e onnx", "FAIL", 3, ["failed: student, student.onnx"]),
        (f"{GATES_OFF} -e onnx --require gone.onnx", "NOT RUN", 4, ["required but NOT RUN: gone.onnx"]),
        (
            f"{GATES_OFF} -e onnx --student bessel:Bessel",
            "FAIL",
            5,
            ["not exported: onnx:fp32: torch cannot export Bessel"],
        ),
        (
            "--min-agreement 0.8 -e onnx --student bessel:Bessel --require student.onnx",
            "FAIL",
            3,
            [
                "failed: student",
                "not exported: onnx:fp32: torch cannot export Bessel",
                "required but NOT RUN: student.onnx",
            ],
        ),
        (
            f"{GATES_OFF} {ARTIFACT_GATES_OFF} {COLLAPSE} -e onnx:int8",
            "FAIL",
            5,
            ["not exported: onnx:int8: the network puts all", "calibration images into class"],
        ),
        (
            f"{COLLAPSE} -e onnx:int8",
            "FAIL",
            3,
            ["failed: student, student.onnx", "not exported: onnx:int8: the network puts all"],
        ),
        (
            f"{GATES_OFF} {ARTIFACT_GATES_OFF} {COLLAPSE} -e openvino:int8 -e onnx:int8:ort-cpu",
            "FAIL",
            5,
            [
                "not exported: onnx:int8: the network puts all",
                "; openvino:int8: it is made of onnx:int8, which failed; onnx:int8:ort-cpu: the network puts all",
            ],
        ),
    ],
)
def test_distill_ends(
    flags: str, headline: str, code: int, reasons: list[str], digits_teacher: Path, tell: Any, monkeypatch: Any
) -> None:
    Path("bessel.py").write_text(NETWORK_THAT_ONNX_LACKS)
    monkeypatch.syspath_prepend(Path.cwd())
    write_collapsed_weights(Path("collapsed.pt"))
    student = [] if "--student" in flags else ["--student", QUICK_STUDENT]
    told = tell("distill", digits_teacher, *student, *shlex.split(FEW), *shlex.split(flags), "--json")
    report = json.loads(told.outcome.out)
    check_agreement(told, report)
    assert (report["headline"], report["exit_code"]) == (headline, code)
    assert all(any(why in reason for reason in report["reasons"]) for why in reasons), report["reasons"]
    exported = not any("not exported" in reason for reason in report["reasons"])
    assert (report["failure"] is None) == exported
    assert exported or report["failure"]["message"] in told.outcome.errors[0]
    # What is left in the folder says the same, and so does what is made of it.
    run = RunFolder(Path("run"))
    assert json.loads(run.report_json.read_text()) == report
    assert run.report_md.read_text().startswith(f"# Verification: {headline}\n")
    text = run_command("report", run.path).out
    assert text.splitlines()[-1] == f"verdict: {headline}"
    assert all(reason in text for reason in report["reasons"])
    html = re.sub(r"&#?\w+;", "", run.report_html.read_text())
    assert all(re.sub(r"[<>'\"&]", "", reason) in html for reason in report["reasons"])


def test_distill_ends_before_there_is_a_report(digits_teacher: Path, tell: Any) -> None:
    arguments = ("distill", digits_teacher, "--student", QUICK_STUDENT, *shlex.split(FEW))
    assert_no_report(tell(*arguments, "--baseline", "nowhere.npz"), 4, "there is no baseline nowhere.npz")
    assert_no_report(tell(*arguments, "-e", "nothing"), 2, "unknown export 'nothing'")
    assert not Path("run").exists()
