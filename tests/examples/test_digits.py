"""The digits example: its script trains, distils, exports and verifies from beginning to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import run_script

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "digits" / "distil_lenet.py"


@pytest.mark.example
def test_the_script_goes_from_digits_to_a_verified_student(tmp_path: Path) -> None:
    done = run_script(SCRIPT, "--out", tmp_path, "--epochs", 2, "--steps", 1)
    assert done.code == 0, done.err
    assert "on 500 unseen digits" in done.out
    assert float(done.out.partition("teacher ")[2].partition("%")[0]) > 50  # after two epochs: labels belong to images
    assert "verdict FAIL" in done.out  # one step teaches nothing, and the gate says so
    assert (tmp_path / "run" / "artifacts" / "student.onnx").exists()
    with np.load(tmp_path / "test.npz") as test:
        assert test["images"].shape == (500, 1, 32, 32)
        assert 0 <= test["images"].min() < test["images"].max() <= 1
