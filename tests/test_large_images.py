"""A teacher of 224 px that nobody here wrote, through the whole pipeline with its default exports."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from command_line import run_command
from torchvision.models import resnet18

if TYPE_CHECKING:
    from pathlib import Path

CONTRACT = ["--input-size", "3,224,224", "--mean", ".485,.456,.406", "--std", ".229,.224,.225"]


@pytest.mark.slow
def test_every_artifact_of_a_224_px_student_agrees_with_it(tmp_path: Path) -> None:
    """Whatever three steps make of the student, its artifacts must be what it is, and be able to show it.

    An untrained teacher sees one class in all images, so INT8 may stay away for want of calibration images.
    """
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=10).state_dict(), tmp_path / "teacher.pt")
    start = ("distill", tmp_path / "teacher.pt", "--student", "mobilenetv2", *CONTRACT, "--steps", 3, "--batch-size", 4)
    outcome = run_command(*start, "--out", tmp_path / "run", "--json")
    assert outcome.code in (0, 3), outcome.err
    report = json.loads(outcome.out)
    assert report["samples"]["n"] == 957
    ran = {name: entry for name, entry in report["artifacts"].items() if entry["verdict"] != "NOT RUN"}
    assert {"student.onnx", "student.fp16.onnx"} <= ran.keys()
    for name, entry in ran.items():
        export = [check for check in entry["checks"] if check["comparison"] == "A"]
        assert export, name
        assert {check["verdict"] for check in export} == {"PASS"}, (name, export)
