"""What a verification leaves in the run folder, and `dfadc report`, which makes it again."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from command_line import run_command
from report_material import ARTIFACT_SHA256, RUN, judge, make_run, make_samples

from dfadc.errors import DfadcError
from dfadc.pipeline.report import rebuild_report, write_report
from dfadc.reporting.markdown import render_details
from dfadc.reporting.rows import confusion_table
from dfadc.run_folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.verification.samples import SampleSet

WRITTEN = ("report.json", "report.md", "report.html")


@pytest.fixture(scope="module")
def samples() -> SampleSet:
    return make_samples()


@pytest.fixture(scope="module")
def written(samples: SampleSet, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = make_run(tmp_path_factory.mktemp("written") / "run", samples)
    write_report(run, judge(samples, RUN), samples)
    return run


@pytest.fixture
def run(written: RunFolder, tmp_path: Path) -> RunFolder:
    """The same, to do with as one likes."""
    shutil.copytree(written.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_a_report_is_written_in_every_form(written: RunFolder) -> None:
    report = json.loads(written.report_json.read_text())
    text = written.report_md.read_text()
    assert text.startswith(f"# Verification: {report['verdict']}\n")
    assert text.endswith(f"\n{render_details(report)}")
    assert report["verdict"] in written.report_html.read_text()


def test_a_report_of_an_earlier_version_is_shown_by_its_verdict(run: RunFolder) -> None:
    report = json.loads(run.report_json.read_text())
    del report["headline"], report["failure"]
    run.report_json.write_text(json.dumps(report))
    rebuild_report(run)
    assert run.report_md.read_text().startswith(f"# Verification: {report['verdict']}\n")


def test_the_json_holds_what_the_page_shows(written: RunFolder) -> None:
    report = json.loads(written.report_json.read_text())
    assert len(report["disagreements"]["worst"]) == 48
    assert report["curves"]["readings"] == 40
    assert report["curves"]["last"]["agreement"] == 0.8
    assert report["curves"]["notes"] == ["step 7: a <b>rollback</b>"]
    assert report["run"]["command"] == RUN["command"]


def test_the_markdown_says_it_too(written: RunFolder) -> None:
    text = written.report_md.read_text()
    report = json.loads(written.report_json.read_text())
    worst = report["disagreements"]["worst"][0]
    assert f"| {worst['index']} | generator | " in text
    assert "| c\\|d | " in text, "a separator in a name is escaped"
    columns, rows = confusion_table(report)
    assert len(columns) == len(rows[0]) == 7, "no column of others where there are none"
    assert f"| f | {' | '.join(rows[5][1:])} |" in text
    assert f"| student.onnx | {ARTIFACT_SHA256} | student | onnx 1.20 | opset 18 |" in text
    assert "| command | dfadc distill teacher.pt --student small |" in text
    assert "student.steps = 2\n" in text
    assert "- step 7: a <b>rollback</b>" in text


def test_a_speed_counts_for_the_artifact_that_was_timed_only(written: RunFolder) -> None:
    networks = json.loads(written.report_json.read_text())["bench"]["networks"]
    assert set(networks) == {"student.onnx"}, "student.int8.onnx was exported anew since"


def test_the_command_makes_every_form_again_byte_for_byte(run: RunFolder) -> None:
    before = {name: (run.path / name).read_bytes() for name in WRITTEN}
    for name in WRITTEN[1:]:
        (run.path / name).unlink()
    outcome = run_command("report", run.path)
    assert outcome.code == 0, outcome.err
    assert "verdict: FAIL" in outcome.out
    assert str(run.report_html) in outcome.err
    assert {name: (run.path / name).read_bytes() for name in WRITTEN} == before


def test_a_run_without_metrics_and_speeds_has_a_report(run: RunFolder) -> None:
    run.metrics.unlink()
    run.bench.unlink()
    report = rebuild_report(run)
    assert report["bench"] is None
    assert report["curves"] == {"readings": 0, "last": {}, "notes": [], "num_notes": 0}
    assert "Training" not in run.report_html.read_text()


def test_a_run_whose_samples_are_gone_keeps_what_was_said_of_them(run: RunFolder) -> None:
    before = json.loads(run.report_json.read_text())["disagreements"]
    run.samples.unlink()
    run.metrics.unlink()
    assert rebuild_report(run)["disagreements"] == before
    page = run.report_html.read_text()
    assert "<img" not in page
    assert "Worst disagreements" in page


def test_metrics_that_are_no_numbers_are_null(run: RunFolder) -> None:
    run.metrics.write_text('[1]\n{"step": 41, "student_loss": NaN, "agreement": Infinity, "terms": null}\n')
    last = rebuild_report(run)["curves"]["last"]
    assert last == {"step": 41, "student_loss": None, "agreement": None}
    assert "| student loss | – |" in run.report_md.read_text()


def test_another_sample_set_is_refused(run: RunFolder) -> None:
    make_samples(counts=(1, 1, 1, 1)).save(run.samples)
    outcome = run_command("report", run.path)
    assert outcome.code == 2
    assert "is not the sample set that report.json judged" in outcome.err
    assert f"dfadc verify {run.path}" in outcome.err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.json", "{", "cannot read"),
        ("report.json", "[]", "has schema None"),
        ("report.json", '{"schema": "dfadc.verification/99"}', "dfadc.verification/99"),
        ("bench.json", "{", "cannot read"),
        ("bench.json", "[]", "holds no speeds"),
        ("bench.json", '{"networks": {"student.onnx": {}}}', "holds no speeds"),
    ],
)
def test_what_cannot_be_read_is_named(run: RunFolder, name: str, text: str, message: str) -> None:
    (run.path / name).write_text(text)
    with pytest.raises(DfadcError, match=message) as caught:
        rebuild_report(run)
    assert name in caught.value.message
    assert "dfadc " in caught.value.hint


def test_a_run_that_was_not_verified_says_how(run: RunFolder) -> None:
    run.report_json.unlink()
    outcome = run_command("report", run.path)
    assert outcome.code == 2
    assert outcome.hints == [f"hint: make it: dfadc verify {run.path}"]
