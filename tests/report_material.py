"""A run folder as far as a report needs one: real samples, real judgements, no training."""

from __future__ import annotations

import copy
import functools
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.contract import ImageContract
from dfadc.run_folder import SCHEMA, RunFolder
from dfadc.verification.judge import ArtifactFile, artifact_not_run, verify_artifact, verify_student
from dfadc.verification.report import build_report
from dfadc.verification.samples import SampleSet
from dfadc.verification.thresholds import Thresholds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dfadc.verification.report import Report

SOURCES = ("generator", "snapshots", "prior", "adversary")
THRESHOLDS = Thresholds(source="generator", min_agreement=0.5, min_coverage=0.5)
#: The user's text: markup, a formula that is none, a table's separator, a script that the pictures' font lacks.
NASTY_NAMES = ("<script>alert(1)</script>", "$x^{$", "c|d", "名前", '" onload="alert(1)', "f")
ARTIFACT_SHA256 = "ab" * 32
RUN = {
    "name": "a run",
    "command": "dfadc distill teacher.pt --student small",
    "teacher": {"architecture": "large", "num_parameters": 4_000_000, "flops": 90_000_000, "sha256": "cd" * 32},
    "student": {"architecture": "small", "num_parameters": 1_000_000, "flops": 9_000_000},
    "versions": {"torch": "2.14.1", "timm": None},
    "notes": ["the teacher is <b>large</b>"],
    "recipe": {"name": "auto", "steps": 9, "batch_size": 8, "student": {"steps": 2}},
    "artifacts": [
        {
            "file": "artifacts/student.onnx",
            "sha256": ARTIFACT_SHA256,
            "parent_sha256": None,
            "tool_versions": {"onnx": "1.20"},
            "notes": ["opset 18"],
        }
    ],
}


def make_samples(
    *,
    num_classes: int = 6,
    shape: tuple[int, int, int] = (1, 8, 8),
    counts: Sequence[int] = (240, 120, 120, 60),
    names: tuple[str, ...] | None = NASTY_NAMES,
    pixels: bool = True,
) -> SampleSet:
    """Noise, and a student that answers nearly as its teacher does."""
    rng, total = np.random.default_rng(0), sum(counts)
    mean, std = ((0.5,) * shape[0], (0.25,) * shape[0]) if pixels else (None, None)
    teacher = rng.normal(size=(total, num_classes)).astype(np.float32) * 3
    return SampleSet(
        images=rng.integers(0, 256, (total, *shape), dtype=np.uint8)
        if pixels
        else rng.normal(size=(total, *shape)).astype(np.float16),
        source=np.repeat(np.arange(len(counts), dtype=np.int8), counts),
        sources=SOURCES,
        teacher_logits=teacher,
        student_logits=teacher + rng.normal(size=teacher.shape).astype(np.float32),
        contract=ImageContract(shape, num_classes, class_names=names, mean=mean, std=std),
    )


def judge(samples: SampleSet, run: dict[str, Any] | None = None) -> Report:
    """A student, an artifact that is its exact copy, a worse one, and one that could not run."""
    student = verify_student(samples, THRESHOLDS)
    noise = np.random.default_rng(1).normal(size=samples.student_logits.shape).astype(np.float32)
    answers = {"student.onnx": ("fp32", 0.0), "student.int8.onnx": ("int8", 0.5)}
    artifacts = [
        verify_artifact(
            ArtifactFile(name, precision, 123_456),
            samples.student_logits + scale * noise,
            samples=samples,
            thresholds=THRESHOLDS,
        )
        for name, (precision, scale) in answers.items()
    ]
    absent = artifact_not_run(ArtifactFile("student.rtx.engine", "fp16", 99), "no NVIDIA GPU & none at all")
    return build_report(
        samples=samples, thresholds=THRESHOLDS, student=student, artifacts=[*artifacts, absent], run=run or {}
    )


def make_run(path: Path, samples: SampleSet, *, readings: int = 40) -> RunFolder:
    """A folder with run.json, samples, metrics (one of them with a NaN, one with a note) and speeds."""
    path.mkdir()
    run = RunFolder(path)
    run.record_file.write_text(json.dumps({"schema": SCHEMA, "status": "finished"}))
    samples.save(run.samples)
    for step in range(1, readings + 1):
        run.append_metrics(
            reading(
                step,
                student_loss=float("nan") if step == 5 else 1 / step,
                note="" if step != 7 else "a <b>rollback</b>",
            )
        )
    timing = {"latency_ms": 1.25, "latency_p95_ms": 1.5, "throughput": 4000.0, "device": "CPU", "speedup": 3.5}
    networks = {
        "student.onnx": {"sha256": ARTIFACT_SHA256, **timing},
        "student.int8.onnx": {"sha256": "gone", **timing},
    }
    bench = {"machine": "a machine", "threads": 1, "batch": 4, "networks": networks}
    run.bench.write_text(json.dumps(bench))
    return run


def reading(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    values = {
        "step": step,
        "steps": 40,
        "student_loss": 1.0,
        "generator_loss": -2.0,
        "terms": {"discrepancy": 0.5, "balance": -1.0},
        "class_entropy": 0.9,
        "agreement": 0.8,
        "collapse": "",
        "student_rate": 0.1,
        "generator_rate": 0.001,
        "images_per_second": 100.0,
        "seconds_left": 0.0,
        "note": "",
    }
    return {**values, **changes}


def passing(report: Report) -> Report:
    """A report without the artifact that fails."""
    del report["artifacts"]["student.int8.onnx"]
    return report | {"verdict": "PASS", "headline": "PASS", "exit_code": 0, "reasons": []}


@functools.cache
def _judged() -> Report:
    return judge(make_samples(names=None))


def judged_report() -> Report:
    """A report to change: the student passes, of its artifacts one passes, one fails and one is NOT RUN."""
    return copy.deepcopy(_judged())
