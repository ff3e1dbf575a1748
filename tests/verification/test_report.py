"""Results, the JSON document and its renderings, from real logits to text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dfadc.contract import ImageContract
from dfadc.reporting.markdown import render_markdown
from dfadc.verification.agreement import predict
from dfadc.verification.checks import Verdict
from dfadc.verification.judge import ArtifactFile, ArtifactResult, artifact_not_run, verify_artifact, verify_student
from dfadc.verification.rates import Accuracy
from dfadc.verification.report import LabelledAccuracy, build_report
from dfadc.verification.samples import SampleSet
from dfadc.verification.summary import COLUMNS, reason_lines, source_rows, summary_rows
from dfadc.verification.thresholds import Thresholds

CONTRACT = ImageContract((1, 4, 4), 6, mean=(0.5,), std=(0.5,), class_names=("a", "b", "c|d", "e", "f", "g"))
THRESHOLDS = Thresholds(source="generator", min_agreement=0.8, min_coverage=0.7)
N = 1200


@pytest.fixture(scope="module")
def samples() -> SampleSet:
    """A student that agrees with its teacher on 90 % of the generator's and all of the snapshots' samples."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(N, 6)).astype(np.float32) * 4
    student = teacher.copy()
    wrong = np.arange(0, N // 2, 10)
    student[wrong] = np.roll(student[wrong], 1, axis=1)
    return SampleSet(
        images=rng.integers(0, 256, (N, 1, 4, 4), dtype=np.uint8),
        source=np.repeat(np.array([0, 1], np.int8), N // 2),
        sources=("generator", "snapshots"),
        teacher_logits=teacher,
        student_logits=student,
        contract=CONTRACT,
    )


def verify(samples: SampleSet, logits: Any, precision: str = "fp32", **options: Any) -> ArtifactResult:
    artifact = ArtifactFile(f"student.{precision}.onnx", precision, 1_234_567)
    return verify_artifact(
        artifact, logits, samples=samples, thresholds=options.pop("thresholds", THRESHOLDS), **options
    )


def report_of(samples: SampleSet, *results: ArtifactResult, **options: Any) -> dict[str, Any]:
    thresholds = options.pop("thresholds", THRESHOLDS)
    student = verify_student(samples, thresholds)
    return build_report(samples=samples, thresholds=thresholds, student=student, artifacts=results, **options)


def mixed_report(samples: SampleSet) -> dict[str, Any]:
    """One artifact that passes, one that answers NaN, one that could not run."""
    labels = samples.teacher_logits.argmax(axis=1)
    labels[::20] = (labels[::20] + 2) % 6
    teacher, student = (
        Accuracy.of(predict(logits) == labels) for logits in (samples.teacher_logits, samples.student_logits)
    )
    good = verify(samples, samples.student_logits, accuracy=student)
    broken = verify(samples, np.full_like(samples.student_logits, np.nan), "int8")
    absent = artifact_not_run(ArtifactFile("student.rtx.engine", "fp16", 99), "no NVIDIA GPU | none at all")
    labelled = LabelledAccuracy(teacher, student)
    networks = {
        "teacher": {"architecture": "large", "num_parameters": 4_000_000, "flops": 90_000_000},
        "student": {"architecture": "small", "num_parameters": 1_000_000, "flops": 450_000},
    }
    run = {"name": "x", "loss": float("nan"), **networks}
    return report_of(samples, good, broken, absent, accuracy=labelled, run=run)


def test_an_exact_export_passes_and_the_headline_is_b_on_the_gates_source(samples: SampleSet) -> None:
    report = report_of(samples, verify(samples, samples.student_logits))
    entry = report["artifacts"]["student.fp32.onnx"]
    assert (report["schema"], report["verdict"], report["exit_code"]) == ("dfadc.verification/1", "PASS", 0)
    assert (entry["verdict"], entry["reasons"], entry["agreement"]) == ("PASS", [], 0.9)
    assert entry["agreement"] == entry["comparisons"]["B"]["generator"]["agreement"]
    assert entry["agreement_low"] < 0.9 < entry["agreement_high"]
    assert set(entry["comparisons"]["A"]) == {"all", "generator", "snapshots"}
    assert entry["comparisons"]["B"]["all"]["agreement"] == 0.95
    assert entry["comparisons"]["C"] == report["coverage"]
    assert (entry["accuracy"], report["accuracy"]) == (None, None)
    assert report["samples"] == {"n": N, "sha256": samples.sha256, "sources": {"generator": 600, "snapshots": 600}}


def test_the_gates_source_can_be_chosen(samples: SampleSet) -> None:
    snapshots = replace(THRESHOLDS, source="snapshots", min_agreement=0.95)
    result = verify(samples, samples.student_logits, thresholds=snapshots)
    assert result.judgement.verdict is Verdict.PASS
    assert report_of(samples, result, thresholds=snapshots)["artifacts"]["student.fp32.onnx"]["agreement"] == 1.0
    generator = verify(samples, samples.student_logits, thresholds=replace(snapshots, source="generator"))
    assert generator.judgement.verdict is Verdict.FAIL


def test_a_source_the_set_does_not_have_fails(samples: SampleSet) -> None:
    prior = replace(THRESHOLDS, source="prior")
    report = report_of(samples, verify(samples, samples.student_logits, thresholds=prior), thresholds=prior)
    assert (report["verdict"], report["exit_code"]) == ("FAIL", 3)
    assert report["artifacts"]["student.fp32.onnx"]["agreement"] is None
    assert "no samples of source 'prior'" in report["student"]["reasons"][0]


def test_no_samples_at_all_fail(samples: SampleSet) -> None:
    empty = replace(
        samples,
        images=samples.images[:0],
        source=samples.source[:0],
        teacher_logits=samples.teacher_logits[:0],
        student_logits=samples.student_logits[:0],
    )
    report = report_of(empty, verify(empty, empty.student_logits))
    assert (report["verdict"], report["exit_code"]) == ("FAIL", 3)
    json.dumps(report, allow_nan=False)
    assert "no samples" in render_markdown(report)


def test_shuffled_classes_fail(samples: SampleSet) -> None:
    result = verify(samples, np.roll(samples.student_logits, 1, axis=1), "int8")
    assert result.judgement.verdict is Verdict.FAIL
    assert {check.comparison for check in result.judgement.checks if check.verdict is Verdict.FAIL} == {"A", "B"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("share", [0.05, 0.0])
def test_a_copy_that_answers_5_percent_otherwise_fails_the_drop_too(precision: str, share: float) -> None:
    """On as many samples as a run has by default, whatever comparison A says of it."""
    rng = np.random.default_rng(3)
    n, gated = 2048, 1024
    teacher = np.eye(6, dtype=np.float32)[np.arange(n) % 6] * 4
    student = np.where(rng.random((n, 1)) < 0.08, np.roll(teacher, 1, axis=1), teacher)
    samples = SampleSet(
        images=rng.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8),
        source=(np.arange(n) >= gated).astype(np.int8),
        sources=("prior", "generator"),
        teacher_logits=teacher,
        student_logits=student,
        contract=CONTRACT,
    )
    answers = np.where(rng.random((n, 1)) < share, np.roll(student, 2, axis=1), student)
    result = verify(samples, answers, precision, thresholds=Thresholds(min_agreement=0.8, min_coverage=0.7))
    assert result.judgement.verdict is (Verdict.FAIL if share else Verdict.PASS)
    (drop,) = (check for check in result.judgement.checks if check.gate == "drop")
    assert drop.verdict is result.judgement.verdict, drop.message


def test_another_number_of_classes_is_refused(samples: SampleSet) -> None:
    with pytest.raises(ValueError, match="candidate logits are"):
        verify(samples, samples.student_logits[:, :5])


def test_the_document_is_json_without_nan(samples: SampleSet) -> None:
    report = mixed_report(samples)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["run"]["name"], report["run"]["loss"]) == ("x", None)
    broken = report["artifacts"]["student.int8.onnx"]
    assert (broken["verdict"], broken["agreement"]) == ("FAIL", 0.0)
    assert broken["comparisons"]["A"]["all"]["kl"] is None
    assert broken["comparisons"]["A"]["all"]["num_nonfinite"] == N


def test_not_run_is_visible_and_no_pass(samples: SampleSet) -> None:
    report = mixed_report(samples)
    absent = report["artifacts"]["student.rtx.engine"]
    assert (absent["verdict"], absent["agreement"], absent["comparisons"]) == (
        "NOT RUN",
        None,
        {"A": {}, "B": {}, "C": {}},
    )
    markdown = render_markdown(report)
    assert "| student.rtx.engine | NOT RUN | fp16 | 0.1 kB | – | – | – |" in markdown
    assert "- student.rtx.engine NOT RUN: no NVIDIA GPU \\| none at all" in markdown


@pytest.mark.parametrize(("required", "exit_code"), [((), 0), (("student.rtx.engine",), 4), (("other.onnx",), 4)])
def test_what_is_required_must_have_run(samples: SampleSet, required: tuple[str, ...], exit_code: int) -> None:
    absent = artifact_not_run(ArtifactFile("student.rtx.engine", "fp16"), "no GPU")
    report = report_of(samples, verify(samples, samples.student_logits), absent, required=required)
    assert report["exit_code"] == exit_code
    assert report["verdict"] == ("NOT RUN" if exit_code else "PASS")


def test_a_gate_switched_off_is_never_a_pass(samples: SampleSet) -> None:
    off = replace(THRESHOLDS, min_agreement=None)
    report = report_of(samples, verify(samples, samples.student_logits, thresholds=off), thresholds=off)
    assert (report["verdict"], report["exit_code"]) == ("NOT GATED", 0)
    assert report["artifacts"]["student.fp32.onnx"]["verdict"] == "NOT GATED"


def test_rows_are_text_under_the_columns(samples: SampleSet) -> None:
    rows = summary_rows(mixed_report(samples))
    assert all(len(row) == len(COLUMNS) and all(isinstance(cell, str) for cell in row) for row in rows)
    assert rows[0][:2] == ("fp32 student", "PASS")
    assert rows[1] == (
        "student.fp32.onnx",
        "PASS",
        "fp32",
        "1.23 MB",
        "90.00% [87.34, 92.15]",
        "100.00% [99.68, 100.00]",
        rows[0][-1],
    )
    assert rows[1][-1].startswith("92.50% [")


def test_source_rows_keep_comparisons_apart(samples: SampleSet) -> None:
    rows = source_rows(mixed_report(samples))
    assert [row[:3] for row in rows if row[0] == "student.fp32.onnx"] == [
        ("student.fp32.onnx", comparison, source) for comparison in "AB" for source in ("all", "generator", "snapshots")
    ]
    assert (
        "student.fp32.onnx",
        "A",
        "all",
        "1200",
        "100.00% [99.68, 100.00]",
        "4",
        "100.00%",
        "0.0000",
        "exact",
        "0",
    ) in rows


def test_markdown_survives_a_round_trip_through_json(samples: SampleSet) -> None:
    report = mixed_report(samples)
    markdown = render_markdown(json.loads(json.dumps(report)))
    assert markdown == render_markdown(report)
    assert markdown.startswith("# Verification: FAIL\n")
    assert "Accuracy on 1,200 labelled images." in markdown
    assert "| teacher | large | 4,000,000 | 90 M | 95.00% [" in markdown
    assert "| student | small | 1,000,000 (25.0%) | 0.45 M (0.5%) | 92.50% [" in markdown
    assert len({line.replace("\\|", "").count("|") for line in markdown.splitlines() if "student.fp32" in line}) == 2


def test_reasons_name_their_artifact(samples: SampleSet) -> None:
    lines = reason_lines(mixed_report(samples))
    assert lines[0] == "failed: student.int8.onnx"
    assert any(line.startswith("student.int8.onnx FAIL: A export: 1200 of 1200 samples have NaN") for line in lines)
