"""Real pseudo-terminals of several widths: no name is shortened, no number vanishes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import termios
from typing import TYPE_CHECKING

import pytest
from command_line import ROOT, run_command
from conftest import QUICK_STUDENT
from processes import ForkedProcess

from dfadc.run_folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

LONG = "a_student_with_a_name_that_is_longer_than_a_terminal.onnx"
ONE_STEP = (
    *("--steps", 1, "--batch-size", 8, "--no-compile", "--set", "log.interval=1", "--set", "student.steps=1"),
    *("--set", "verify.num_samples=64"),
    *("--set", "calibration.num_images=16", "--set", "compute.precision=fp32", "-e", "onnx"),
)


def on_terminal(columns: int, *arguments: object) -> str:
    """All that appears on a terminal, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
    process = ForkedProcess(
        ["from dfadc.cli.main import main\nmain()", *map(str, arguments)],
        env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # how Linux says that nobody has the terminal open any more
        pass
    finally:
        os.close(ours)
        process.kill()
        process.wait()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    return text.replace("\r\n", "\n").replace("\r", "\n")


def assert_all_is_shown(piped: str, shown: str, columns: int) -> None:
    """Each cell of a table, as a pipe gets it, is on the terminal: prose word by word, all else in one piece."""
    rows = [[cell.strip() for cell in line[1:-1].split("│")] for line in piped.splitlines() if line.startswith("│")]
    assert rows
    for row in rows:
        for index, cell in enumerate(row):
            for piece in [cell] if not index or len(cell) <= 32 else cell.split():
                assert piece in shown, f"{piece} of {row}"
    assert "…" not in shown
    assert all(len(line) <= columns for line in shown.splitlines() if line.startswith(("│", "┃", "└")))


@pytest.fixture(scope="module")
def long_named_run(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose artifact has a long name."""
    run = RunFolder(tmp_path_factory.mktemp("long") / "run")
    shutil.copytree(finished_run.path, run.path)
    (run.artifacts / "student.onnx").rename(run.artifacts / LONG)
    manifest = run.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("student.onnx", LONG))
    assert run_command("verify", run.path).code == 0
    return run


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("command", [("report",), ("students", "lenet5", QUICK_STUDENT), ("doctor",)])
def test_a_table_loses_nothing(columns: int, command: tuple[str, ...], long_named_run: RunFolder) -> None:
    arguments = (*command, long_named_run.path) if command == ("report",) else command
    piped = run_command(*arguments)
    shown = on_terminal(columns, *arguments)
    assert_all_is_shown(piped.out, shown, columns)
    if command == ("report",):
        assert LONG in shown
        assert "verdict: PASS" in shown.splitlines()


@pytest.mark.parametrize("columns", [80, 40])
def test_bench_shows_every_number(columns: int, long_named_run: RunFolder) -> None:
    shown = on_terminal(columns, "bench", long_named_run.path, "--seconds", 0.01, "--batch", 2)
    measured = json.loads(long_named_run.bench.read_text())["networks"]
    assert set(measured) == {"teacher", LONG}
    for name, found in measured.items():
        assert name in shown
        for number in (found["latency_ms"], found["latency_p95_ms"]):
            assert f"{number:.2f} ms" in shown
        for ratio in (found["speedup"], found["throughput_ratio"]):
            assert f"{ratio:.2f}x" in shown
        assert f"{found['throughput']:,.0f}" in shown
        assert found["device"] in shown
    assert "…" not in shown


def test_progress_and_verdict_of_a_training(digits_teacher: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    start = ("distill", digits_teacher, "--student", QUICK_STUDENT, *ONE_STEP, "--out", run.path)
    shown = on_terminal(40, *start)
    assert "…" not in shown
    (reading,) = run.read_metrics()
    progress = " ".join(shown.split())
    for number in (
        "1/1",
        f"loss {reading['student_loss']:.3f}",
        f"class entropy {reading['class_entropy']:.2f}",
        "0:00",
    ):
        assert number in progress
    for cell in ("fp32 student", "student.onnx", f"{(run.artifacts / 'student.onnx').stat().st_size / 1e3:.1f} kB"):
        assert cell in shown
    report = json.loads(run.report_json.read_text())
    assert f"verdict: {report['headline']}" in shown.splitlines()


def test_a_terminal_is_as_wide_as_the_user_says(long_named_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """COLUMNS counts where there is a terminal; a pipe takes any width."""
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, run_command("report", long_named_run.path).out.splitlines())) > 100
