"""Verification runs where torch does not, and its two innermost files run where dfadc does not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import dfadc.verification
import dfadc.verification.agreement
import dfadc.verification.gate

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
    names = ", ".join(f"dfadc.verification.{name}" for name in ("gate", "extra_gates", "mcnemar", "reasons"))
    run_python(f"import sys; sys.modules['numpy'] = None\nimport {names}\n")


def test_agreement_and_gate_run_alone(tmp_path: Path) -> None:
    """As in a device kit: three files in a folder, and no dfadc."""
    for module in (dfadc.verification.agreement, dfadc.verification.gate, dfadc.verification.mcnemar):
        shutil.copy(str(module.__file__), tmp_path)
    program = f"""
import sys; sys.modules['dfadc'] = None; sys.path.insert(0, {str(tmp_path)!r})
import numpy as np, agreement, gate, mcnemar
logits = np.eye(4, dtype=np.float32)[np.arange(800) % 4]
same = agreement.compare(logits, logits)
judgement = gate.judge_artifact(
    precision="fp16", against_student=same, against_teacher=same, student_against_teacher=same,
    pairs=mcnemar.Pairs(800, 800, 0, 0), coverage=agreement.measure_coverage(logits),
    thresholds=gate.Thresholds(min_agreement=0.9, min_coverage=0.5),
)
assert judgement.verdict == "PASS", judgement
"""
    run_python(program, tmp_path)
