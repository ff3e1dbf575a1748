"""Verification runs without torch, its gates without numpy, and its folder without the rest of dfadc."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import dfadc.verification

BLOCKED = "import sys; sys.modules['torch'] = None; sys.modules['torchvision'] = None\n"


def run_python(program: str, folder: Path | None = None) -> None:
    options = ["-I"] if folder is not None else []
    result = subprocess.run(  # noqa: S603 - our own interpreter and program
        [sys.executable, *options, "-W", "error", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_nothing_in_verification_needs_torch() -> None:
    names = sorted(path.stem for path in Path(str(dfadc.verification.__file__)).parent.glob("[a-z]*.py"))
    assert "regression" in names
    run_python(BLOCKED + "".join(f"import dfadc.verification.{name}\n" for name in names))


def test_gates_are_standard_library_only() -> None:
    names = ", ".join(f"dfadc.verification.{name}" for name in ("gate", "checks", "thresholds", "mcnemar"))
    run_python(f"import sys; sys.modules['numpy'] = None\nimport {names}\n")


def test_verification_runs_from_a_copy_of_its_folder(tmp_path: Path) -> None:
    """As in a device kit: the folder and the few modules below it, without the rest of dfadc."""
    source = Path(str(dfadc.verification.__file__)).parent
    shutil.copytree(source, tmp_path / "dfadc" / "verification")
    for name in ("__init__", "_version", "array_file", "contract", "errors", "preprocessing", "storage"):
        shutil.copy(source.parent / f"{name}.py", tmp_path / "dfadc")
    program = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import numpy as np
from dfadc.verification import agreement, coverage, gate, mcnemar, thresholds
assert gate.__file__.startswith({str(tmp_path)!r})
logits = np.eye(4, dtype=np.float32)[np.arange(800) % 4]
same = agreement.compare(logits, logits)
judgement = gate.judge_artifact(
    precision="fp16", against_student=same, against_teacher=same, student_against_teacher=same,
    pairs=mcnemar.Pairs(800, 800, 0, 0), coverage=coverage.measure_coverage(agreement.predict(logits), 4),
    thresholds=thresholds.Thresholds(min_agreement=0.9, min_coverage=0.5),
)
assert judgement.verdict == "PASS", judgement
"""
    run_python(program, tmp_path)
