"""Streams and disks that take no text: closed, full, read by nobody, or of another encoding than UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from command_line import ROOT, Outcome, command_process, disk_that_holds, files_of, finish_command, run_command
from conftest import QUICK_STUDENT

from dfadc.run_folder import RunFolder
from dfadc.run_lock import LOCK

if TYPE_CHECKING:
    from pathlib import Path

#: Code that talks on every way to stdout that there is.
NOISE = """
import atexit, ctypes, logging, os, subprocess, sys, warnings
def talk():
    print("NOISE of Python")
    print("NOISE of Python's own stdout", file=sys.__stdout__, flush=True)
    os.write(1, b"NOISE of a library" + b"\\n")
    ctypes.CDLL(None).puts(b"NOISE of C")
    ctypes.CDLL(None).fflush(None)
    subprocess.run(["echo", "NOISE of a program"])
    warnings.warn("NOISE of a warning")
    logging.basicConfig(stream=sys.stdout)
    logging.error("NOISE of a logger")
"""
#: Talks whenever a command calls a function.
TALKING = """
import {module}
def talking(*arguments, before={module}.{name}, **settings):
    talk()
    return before(*arguments, **settings)
{module}.{name} = talking
"""


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def in_shell(redirection: str, *arguments: object, **environment: str) -> Outcome:
    """A command as a shell runs it, with its streams redirected."""
    program = f'"$0" -m dfadc "$@" {redirection}'
    done = subprocess.run(  # noqa: S603 -- our own interpreter
        ["bash", "-o", "pipefail", "-c", program, sys.executable, *map(str, arguments)],  # noqa: S607
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        check=False,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1"))


@pytest.mark.parametrize(
    ("redirection", "code", "reason", "arguments"),
    [
        (">&-", 7, "it is closed", ("recipe", "list")),
        (">&-", 7, "it is closed", ("--version",)),
        ("> /dev/full", 7, "No space left on device", ("recipe", "list")),
        ("> /dev/full", 7, "No space left on device", ("inspect", "{onnx}", "--json")),
        ("> /dev/full", 7, "No space left on device", ("--help",)),
        ("| true", 141, "", ("recipe", "list")),
        ("2> /dev/full", 0, "", ("recipe", "list")),
        ("2>&-", 0, "", ("recipe", "list")),
        ("0<&- 2>&-", 0, "", ("recipe", "list")),
    ],
)
def test_a_stream_that_takes_nothing(
    redirection: str, code: int, reason: str, arguments: tuple[str, ...], finished_run: RunFolder
) -> None:
    onnx = finished_run.artifacts / "student.onnx"
    outcome = in_shell(redirection, *(word.format(onnx=onnx) for word in arguments))
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    assert "Exception ignored" not in outcome.err
    assert (outcome.out != "") == (code == 0)
    said = f"error: cannot write the result to stdout: {reason}"
    assert outcome.errors == ([said] if reason else [])


def test_junit_does_not_pass_where_the_verdict_could_not_be_printed(run_copy: RunFolder, tmp_path: Path) -> None:
    outcome = in_shell("> /dev/full", "verify", run_copy.path, "--junit", tmp_path / "junit.xml")
    assert outcome.code == 7
    assert ET.parse(tmp_path / "junit.xml").getroot().get("errors") == "1"  # noqa: S314 -- our own file


@pytest.mark.parametrize(
    "environment",
    [
        *({"PYTHONIOENCODING": name} for name in ("ascii", "cp437")),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=lambda environment: " ".join(environment.values()),
)
def test_another_encoding_than_utf_8_is_spelled(environment: dict[str, str], run_copy: RunFolder) -> None:
    run_copy.metrics.write_text("")  # curves would take most of the time
    record = run_copy.record()
    record["contract"]["class_names"] = [f"Käfer {index} 虫" for index in range(10)]
    run_copy.update_record(record)
    for arguments in (("report", run_copy.path, "-v"), ("inspect", run_copy.path / "nichts – da.onnx")):
        outcome = in_shell("", *arguments, **environment)
        assert outcome.code == (0 if arguments[0] == "report" else 2), outcome.err
        assert "Traceback" not in outcome.err
        if environment.get("PYTHONIOENCODING") in {None, "ascii"}:
            assert (outcome.out + outcome.err).isascii()
    report = in_shell("", "report", run_copy.path, "--json", **environment)
    assert json.loads(report.out) == json.loads(run_command("report", run_copy.path, "--json").out)


def test_what_ascii_lacks_is_spelled_as_a_person_would(tmp_path: Path) -> None:
    missing = tmp_path / "Käfer – 虫.onnx"
    outcome = in_shell("", "inspect", missing, PYTHONIOENCODING="ascii")
    assert "Kafer - ?.onnx" in outcome.errors[0]


@pytest.mark.parametrize("command", ["verify", "report"])
def test_a_full_disk_keeps_no_verdict_from_being_told(command: str, run_copy: RunFolder) -> None:
    before, expected = files_of(run_copy.path), run_command(command, run_copy.path)
    with disk_that_holds(1000):
        as_text, as_json = run_command(command, run_copy.path), run_command(command, run_copy.path, "--json")
    assert as_text.out == expected.out
    assert as_text.code == as_json.code == expected.code == 0
    assert "note: report not written: cannot write " in as_text.err
    assert "free some space" in as_text.err
    assert "--out" not in as_text.err
    assert "report: " not in as_text.err
    (note,) = (note for note in json.loads(as_json.out)["notes"] if note.startswith("report not written"))
    assert "File too large" in note
    assert files_of(run_copy.path).keys() == before.keys() | {LOCK}


def test_a_full_disk_keeps_no_measurement_from_being_told(run_copy: RunFolder) -> None:
    with disk_that_holds(100):
        outcome = run_command("bench", run_copy.path, "--seconds", 0.01, "--threads", 1, "--batch", 2, "--json")
    assert outcome.code == 0, outcome.err
    measured = json.loads(outcome.out)
    assert measured["networks"]["student.onnx"]["latency_ms"] > 0
    assert any(note.startswith("bench.json not written: cannot write ") for note in measured["notes"])
    assert not run_copy.bench.exists()


def test_a_disk_without_room_for_temporary_files_is_a_storage_failure(run_copy: RunFolder) -> None:
    """Met outside of what dfadc writes, where a library or the system opens the file."""
    full = "import errno, tempfile\ndef fail(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device', '/tmp')\n"
    with command_process("verify", run_copy.path, preamble=f"{full}tempfile.TemporaryFile = fail") as process:
        outcome = finish_command(process)
    assert outcome.code == 7
    assert outcome.errors == ["error: cannot write /tmp: No space left on device"]


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_a_terminal_that_closes_stops_a_training_and_nohup_keeps_it(
    ignored: bool, digits_teacher: Path, tmp_path: Path
) -> None:
    steps = 4 if ignored else 100_000
    run = RunFolder(tmp_path / "run")
    small = ("--steps", steps, "--batch-size", 8, "--no-compile", "--set", "log.interval=1", "--out", run.path)
    few = ("--set", "verify.num_samples=64")
    preamble = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)" if ignored else ""
    start = ("distill", digits_teacher, "--student", QUICK_STUDENT, "-e", "onnx", *small, *few)
    with command_process(*start, preamble=preamble) as process:
        while not (run.metrics.exists() and run.metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGHUP)
        outcome = finish_command(process)
    if ignored:
        assert outcome.code in {0, 3}, outcome.err
        assert run.record()["status"] == "finished"
    else:
        assert outcome.code == 130, outcome.err
        assert "the state is saved" in outcome.errors[0]
        assert (run.checkpoints / "last.pt").exists()


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("dfadc.student.build.list_students", ("students", "lenet5", "--input-size", "1x28x28")),
        ("dfadc.pipeline.doctor.diagnose", ("doctor",)),
        ("dfadc.run_folder.open_run", ("verify", "{run}")),
        ("dfadc.run_folder.open_run", ("export", "{run}", "-e", "onnx:fp16")),
        ("dfadc.run_folder.open_run", ("bench", "{run}", "--seconds", 0.01, "--batch", 2)),
        ("dfadc.run_folder.open_run", ("baseline", "{run}", "-o", "{run}.npz")),
        ("dfadc.pipeline.distill.load_teacher", ("distill", "{teacher}", "--student", QUICK_STUDENT, "--dry-run")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_json_is_the_only_thing_on_stdout(
    place: str, command: tuple[object, ...], run_copy: RunFolder, digits_teacher: Path
) -> None:
    module, _, name = place.rpartition(".")
    words = [str(word).format(run=run_copy.path, teacher=digits_teacher) for word in command]
    preamble = NOISE + TALKING.format(module=module, name=name)
    with command_process(*words, "--json", preamble=preamble) as process:
        outcome = finish_command(process)
    assert outcome.code == 0, outcome.err
    json.loads(outcome.out)
    assert "NOISE" not in outcome.out
    assert outcome.err.count("NOISE") >= 7
