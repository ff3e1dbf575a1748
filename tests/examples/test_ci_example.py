"""The CI example: the proof on a run of seconds, the shell script as any CI runs it, and a workflow that calls it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from command_line import ROOT, run_command

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.run_folder import RunFolder

EXAMPLE = ROOT / "examples" / "ci"


@pytest.fixture(scope="module")
def command_on_path(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `dfadc` is this checkout's."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "dfadc").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dfadc "$@"\n')
    (folder / "dfadc").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def workplace(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a run and its baseline, by names that a shell must not split."""
    folder = tmp_path_factory.mktemp("a repository")
    shutil.copytree(finished_run.path, folder / "a run")
    assert run_command("baseline", folder / "a run", "-o", folder / "a baseline.npz", "--quiet").code == 0
    return folder


def run_script(workplace: Path, environment: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 -- the script that is tested
        [EXAMPLE / "verify.sh"],
        cwd=workplace,
        env={**environment, "RUN": "a run", "BASELINE": "a baseline.npz", "OUT": "out here", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.example
def test_every_damage_fails_and_an_unharmed_copy_passes(
    finished_run: RunFolder, command_on_path: dict[str, str]
) -> None:
    before = sorted(path.name for path in finished_run.path.rglob("*"))
    done = subprocess.run(  # noqa: S603 -- our script
        [sys.executable, EXAMPLE / "prove_the_gate_blocks.py", finished_run.path],
        env=command_on_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [re.findall(r"exit (\d), as it must", line)[0] for line in done.stdout.splitlines() if "exit" in line] == [
        *("0", "0"),
        *("3", "3", "3"),
    ]
    assert done.stdout.endswith("the gate blocks\n")
    for comparison in ("A export", "B distillation", "D baseline"):
        assert f"FAIL  {comparison}" in done.stdout
    assert sorted(path.name for path in finished_run.path.rglob("*")) == before


@pytest.mark.slow
def test_damage_is_measured_and_so_are_false_alarms(
    finished_run: RunFolder,
    worse_run: RunFolder,
    digits_data: Path,
    command_on_path: dict[str, str],
    tmp_path: Path,
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    assert run_command("export", tmp_path / "run", "-e", "onnx:int8").code == 0
    script = [
        *(EXAMPLE / "measure_the_gate.py", tmp_path / "run", "--data", digits_data, "--seeds", 1, "--draws", 2),
        *("--redistilled", finished_run.path, worse_run.path),
    ]
    done = subprocess.run(  # noqa: S603 -- our script
        [sys.executable, *map(str, script)], env=command_on_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    damaged = [row for row in rows if len(row) == 5 and row[1] == "0"]
    assert len(damaged) == 4
    assert all(float(row[2]) >= 3 for row in damaged)
    assert [row[0] for row in rows if "calibration draw" in row[0]] == ["calibration draw 0", "calibration draw 1"]
    # The same run, and one of few steps: that is no false alarm.
    assert [(row[0], row[3]) for row in rows[-2:]] == [(str(finished_run.path), "no"), (str(worse_run.path), "YES")]
    assert re.search(r"^caught: \d of 4$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^false alarms: \d of 2$", done.stdout, re.MULTILINE)) == 2


@pytest.mark.example
def test_the_script_passes_a_run_that_is_no_worse(
    workplace: Path, command_on_path: dict[str, str], digits_data: Path
) -> None:
    twice = "student.onnx student.onnx"  # two words
    done = run_script(
        workplace, command_on_path, REQUIRE=twice, DATA=str(digits_data), MIN_ACCURACY="0.01", MAX_DROP="0.02"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((workplace / "out here" / "report.json").read_text())
    assert report["verdict"] == "PASS"
    assert report["gate"]["required"] == ["student.onnx"]
    assert (report["gate"]["min_accuracy"], report["gate"]["max_baseline_drop"]) == (0.01, 0.02)
    assert ET.parse(workplace / "out here" / "junit.xml").getroot().get("failures") == "0"  # noqa: S314


@pytest.mark.parametrize(("variables", "code"), [({"BASELINE": "nowhere.npz"}, 4), ({"RUN": "nowhere"}, 2)])
def test_the_script_ends_with_the_commands_exit_code(
    variables: dict[str, str], code: int, workplace: Path, command_on_path: dict[str, str]
) -> None:
    assert run_script(workplace, command_on_path, **variables).returncode == code
    root = ET.parse(workplace / "out here" / "junit.xml").getroot()  # noqa: S314
    assert int(str(root.get("failures"))) + int(str(root.get("errors"))) > 0


def test_the_script_says_what_it_needs(workplace: Path, command_on_path: dict[str, str]) -> None:
    done = run_script(workplace, command_on_path, RUN="")
    assert done.returncode != 0
    assert "the folder of a finished run" in done.stderr


def test_the_workflow_runs_what_lies_beside_it() -> None:
    text = (EXAMPLE / "github-actions.yml").read_text()
    commands = re.findall(r"^ +run: (.+)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["python", "dfadc", "ci/verify.sh", "python"]
    for script in re.findall(r"ci/(\S+)", " ".join(commands)):
        assert (EXAMPLE / script).is_file()
    defined = set(re.findall(r"^  ([A-Z]+): ", text, re.MULTILINE))
    asked = set(re.findall(r"^([a-z]+)=\$\{([A-Z]+):\?", (EXAMPLE / "verify.sh").read_text(), re.MULTILINE))
    assert {name for _, name in asked} <= defined
    assert os.access(EXAMPLE / "verify.sh", os.X_OK)
