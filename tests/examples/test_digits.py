"""The digits example: its script trains, distils, exports and verifies from beginning to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "digits" / "distil_lenet.py"


def test_the_script_goes_from_digits_to_a_verified_student(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--epochs", "2", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603 -- our script
    assert done.returncode == 0, done.stderr
    assert "on 500 unseen digits" in done.stdout
    assert (
        float(done.stdout.partition("teacher ")[2].partition("%")[0]) > 50
    )  # after two epochs: labels belong to images
    assert "verdict FAIL" in done.stdout  # one step teaches nothing, and the gate says so
    assert (tmp_path / "run" / "artifacts" / "student.onnx").exists()
    with np.load(tmp_path / "test.npz") as test:
        assert test["images"].shape == (500, 1, 32, 32)
        assert 0 <= test["images"].min() < test["images"].max() <= 1
