"""The GPU measurement: every stage runs on the CPU in its smallest form; one that fails or is late stops no other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import run_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "gpu" / "measure_gpu.py"
#: The last stage is the third for longer.
STAGES = (
    *("environment", "GPU tests", "auto, 1 minute", "step of auto"),
    *("step at 224 px", "the paper's loop", "TensorRT-RTX"),
)


def measure(out: Path, *options: str, **variables: str) -> dict[str, Any]:
    """The script as a person starts it from a source tree that is not installed; its stages are processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PYTHONPATH": str(ROOT), **variables}.items():
            patch.setenv(name, value)
        patch.chdir(out.parent)
        done = run_script(SCRIPT, "--out", out, "--device", "cpu", "--tiny", *options)
    assert done.code == 0, done.err
    stages: dict[str, Any] = json.loads((out / "gpu.json").read_text())["stages"]
    return stages


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("gpu") / "out"
    chosen = [part for name in STAGES for part in ("--only", name)]
    return measure(out, "--minutes", "30", "--commit", "c0ffee", *chosen), (out / "gpu.md").read_text()


@pytest.mark.slow
def test_every_stage_measures_something(stages: tuple[dict[str, Any], str]) -> None:
    found, page = stages
    assert list(found) == list(STAGES)
    for name, stage in found.items():
        assert stage["outcome"] == "done", f"{name}: {stage['error']}"
        assert f"## {name}" in page
    assert found["environment"]["facts"]["commit"] == "c0ffee"
    assert found["GPU tests"]["facts"]["tests"] == 3
    assert found["GPU tests"]["facts"]["failures"] == 0
    assert "of 2000" in found["auto, 1 minute"]["facts"]["accuracy of the student"]
    assert found["auto, 1 minute"]["tables"]["Commands"][0]["exit code"] in (0, 3)
    tables = found["TensorRT-RTX"]["tables"]
    assert [row["artifact"] for row in tables["Artifacts"]] == ["student.onnx"]
    assert {row["network"] for row in tables["Speed"]} >= {"teacher", "student.onnx"}
    (loops,) = (rows for title, rows in found["the paper's loop"]["tables"].items() if title.startswith("mnist: "))
    assert [row["variant"] for row in loops] == ["the paper's loop, fp32", "dfad fp32", "dfad bf16"]
    for name in ("step of auto", "step at 224 px"):
        (steps,) = (rows for title, rows in found[name]["tables"].items() if title.startswith("Steps of auto"))
        assert all(row["step, ms"] > 0 < row["images/s"] for row in steps)
    assert found["step of auto"]["tables"]["Host operations of auto fp32"]


@pytest.mark.example
def test_a_stage_that_takes_too_long_is_ended_and_the_next_ones_are_not_begun(tmp_path: Path) -> None:
    found = measure(tmp_path / "out", "--minutes", "0.1", "--only", "step at 224 px", "--only", "environment")
    assert "ENDED at its limit" in {stage["outcome"] for stage in found.values()}


@pytest.mark.example
def test_a_failed_stage_is_told_with_the_end_of_its_output(tmp_path: Path) -> None:
    """pytest is another program here, which leaves no report."""
    (tmp_path / "pytest.py").write_text("raise SystemExit('no tests today')\n")
    chosen = ("--minutes", "2", "--only", "GPU tests", "--only", "environment")
    found = measure(tmp_path / "out", *chosen, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert found["environment"]["outcome"] == "done"
    assert found["GPU tests"]["outcome"].startswith("FAILED: exit code")
    assert "no tests today" in "\n".join(found["GPU tests"]["error"])
    assert found["GPU tests"]["facts"]["exit code"] == 1
