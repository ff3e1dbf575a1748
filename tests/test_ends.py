"""Ends that are not clean: signals, kills, no memory, a launcher of many processes. Nothing is left in halves."""

from __future__ import annotations

import shutil
import signal
import time
from typing import TYPE_CHECKING

import pytest
from command_line import command_process, finish_command, run_command
from conftest import QUICK_STUDENT

from dfadc.errors import DfadcError, OutOfMemory, StorageFailed, memory_errors
from dfadc.run_folder import RunFolder
from dfadc.run_lock import LOCK, check_claimable
from exporters.manifest import check_unchanged

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TINY = ("--steps", 1, "--batch-size", 2, "--set", "verify.num_samples=24", "--no-compile", "--export", "onnx")
#: Kills the process when it is about to move a file to its place: which one, and the which time.
KILL_AT = """
import os, signal
from pathlib import Path
replace, seen = Path.replace, []
def replace_or_die(path, target):
    seen.append(Path(target).name)
    if Path(target).name == {name!r} and seen.count({name!r}) == {time}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)
Path.replace = replace_or_die
"""
#: Imports what the command will need, and then leaves it so many MiB.
MEBIBYTES = """
import resource
import torch, onnxruntime
import dfadc.pipeline.bench, dfadc.pipeline.distill, exporters.sessions.onnx_runtime
room = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + {mebibytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
"""


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    (tmp_path / "run" / LOCK).unlink()
    return RunFolder(tmp_path / "run")


@pytest.mark.parametrize(
    "command", [("export", "{run}", "-e", "onnx", "-e", "onnx:int8"), ("verify", "{run}"), ("report", "{run}")]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_command_and_leaves_the_run_usable(
    number: signal.Signals, command: Sequence[str], run_copy: RunFolder
) -> None:
    with command_process(*(word.format(run=run_copy.path) for word in command)) as process:
        while not (run_copy.path / LOCK).exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        outcome = finish_command(process)
    assert outcome.code == 130, outcome.err
    assert outcome.errors == ["error: interrupted"]
    assert "Traceback" not in outcome.err
    assert run_copy.record()["status"] == "finished"
    check_unchanged(run_copy.path)
    assert [path.name for path in run_copy.path.rglob(".*") if path.name != LOCK] == []
    assert run_command("verify", run_copy.path).code == 0


@pytest.mark.parametrize(("name", "which"), [("run.json", 1), ("recipe.toml", 1), ("run.json", 2)])
def test_a_run_killed_while_it_is_described_is_begun_again(
    name: str, which: int, digits_teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start = ("distill", digits_teacher, "--student", QUICK_STUDENT, "--out", run, *TINY)
    with command_process(*start, preamble=KILL_AT.format(name=name, time=which)) as process:
        assert finish_command(process).code == -signal.SIGKILL
    assert any(path.name.startswith(f".{name}.") for path in run.iterdir()), "it was not killed there"
    check_claimable(run, force=False)
    if name == "recipe.toml":  # the last file: once is enough
        assert run_command(*start).code in (0, 3)
        assert {path.name for path in run.rglob(".*")} == {LOCK}


@pytest.mark.parametrize(
    ("command", "mebibytes", "hint"),
    [
        (("distill", "{teacher}", "--student", QUICK_STUDENT, "--batch-size", 60_000), 400, "compute.micro_batch"),
        (("bench", "{run}", "--batch", 200_000, "--seconds", 0.01), 300, "lower --batch"),
    ],
    ids=["distill", "bench"],
)
def test_no_memory_is_one_error_that_says_what_to_lower(
    command: Sequence[object], mebibytes: int, hint: str, run_copy: RunFolder, digits_teacher: Path, tmp_path: Path
) -> None:
    words = [str(word).format(run=run_copy.path, teacher=digits_teacher) for word in command]
    out = ("--out", tmp_path / "new") if command[0] == "distill" else ()
    with command_process(*words, *out, preamble=MEBIBYTES.format(mebibytes=mebibytes)) as process:
        outcome = finish_command(process)
    assert outcome.code == 7, outcome.err
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith("error: memory ran out: ")
    assert hint in outcome.hints[0]
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Non-zero status code returned while running Conv node: Failed to allocate memory for requested"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: type(error).__name__ + str(error)[:20],
)
def test_every_way_to_say_that_memory_ran_out(error: Exception) -> None:
    def convert() -> None:
        try:
            raise error
        except (MemoryError, RuntimeError) as exc:
            raise DfadcError("the network cannot take these images") from exc

    @memory_errors("lower it")
    def fail(*, converted: bool) -> None:
        if converted:
            convert()
        raise error

    for converted in (False, True):
        with pytest.raises(OutOfMemory, match="memory ran out") as caught:
            fail(converted=converted)
        assert (caught.value.hint, caught.value.exit_code) == ("lower it", 7)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), StorageFailed("No space left on device"), ValueError("x")])
def test_another_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_errors("lower it"):
        raise error
    assert caught.value is error


def test_onnx_runtime_without_memory(run_copy: RunFolder) -> None:
    """Its arena fails in an error of its own, where a network on its way needs more than there is."""
    program = f"""
import numpy as np
from pathlib import Path
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from dfadc.errors import OutOfMemory, memory_errors
images = np.zeros((100_000, 1, 8, 8), np.float32)
with OnnxRuntimeSession(Path({str(run_copy.artifacts / "student.onnx")!r}), batch_size=len(images)) as session:
    {MEBIBYTES.format(mebibytes=40).strip().replace(chr(10), chr(10) + "    ")}
    with memory_errors("lower it"):
        session.run(images)
"""
    with command_process(preamble=program) as process:
        outcome = finish_command(process)
    assert "dfadc.errors.OutOfMemory: memory ran out: ONNX Runtime cannot run these images" in outcome.err
    assert "Failed to allocate memory" in outcome.err


@pytest.mark.parametrize("command", ["distill", "--resume", "export", "verify"])
def test_a_launcher_of_several_processes_is_refused(
    command: str, run_copy: RunFolder, digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {
        "distill": ("distill", digits_teacher, "--student", QUICK_STUDENT, "--out", tmp_path / "new"),
        "--resume": ("distill", "--resume", run_copy.path),
    }
    outcome = run_command(*words.get(command, (command, run_copy.path)))
    assert outcome.code == 2
    assert "a launcher started 2 processes (WORLD_SIZE)" in outcome.errors[0]
    assert "torchrun" in outcome.hints[0]
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run_command("report", run_copy.path).code == 0


def test_a_signal_during_a_native_import_interrupts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's native part turns the interrupt into an ImportError, whose cause is the interrupt."""

    def interrupted_import() -> None:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr("dfadc.pipeline.doctor.diagnose", interrupted_import)
    outcome = run_command("doctor")
    assert outcome.code == 130
    assert outcome.errors == ["error: interrupted"]
