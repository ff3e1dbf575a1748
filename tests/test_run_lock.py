"""One process owns a run folder: who comes second is told who came first, and nothing is deleted under anybody."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from command_line import ROOT, command_process, files_of, finish_command, run_command
from conftest import QUICK_STUDENT

from dfadc.errors import DfadcError, StorageFailed
from dfadc.run_folder import RunFolder
from dfadc.run_lock import LOCK, locked, reserved_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Holds the lock of a folder until it is told to end.
HOLDER = """
import sys
from pathlib import Path
from dfadc.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
#: Gives up the capabilities of Linux that let an administrator write anywhere.
UNPRIVILEGED = """
import ctypes
nothing, header = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 2)(0x20080522, 0)
if ctypes.CDLL(None).capset(header, nothing) != 0: raise SystemExit("capset failed")
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(  # noqa: S603 -- our own interpreter
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(DfadcError, match=f"in use by process {process.pid}$") as caught, locked(tmp_path):
            pass
        assert caught.value.exit_code == 2
        assert f"kill {process.pid}" in caught.value.hint
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(tmp_path):
            pass


def test_the_thread_that_holds_a_run_may_take_it_again(tmp_path: Path) -> None:
    def take() -> None:
        with locked(tmp_path):
            pass

    refused = pytest.raises(DfadcError, match=f"process {os.getpid()}")
    with locked(tmp_path), locked(tmp_path), ThreadPoolExecutor() as pool, refused:
        pool.submit(take).result()
    with ThreadPoolExecutor() as pool:
        pool.submit(take).result()


def test_a_folder_that_was_replaced_is_locked_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with locked(run):
        pass
    shutil.rmtree(run)
    run.mkdir()
    with locked(run), pytest.raises(DfadcError, match="in use"), ThreadPoolExecutor() as pool:
        pool.submit(locked(run).__enter__).result()


def test_a_link_to_a_run_is_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with holder(tmp_path / "run"), pytest.raises(DfadcError, match="in use"), locked(tmp_path / "link"):
        pass


@pytest.mark.parametrize(
    "command",
    [
        ("distill", "--resume", "{run}"),
        ("distill", "{teacher}", "--student", QUICK_STUDENT, "--steps", "1", "--out", "{run}", "--force"),
        ("export", "{run}", "-e", "onnx"),
        ("verify", "{run}"),
        ("report", "{run}"),
        ("bench", "{run}", "--seconds", "0.01"),
    ],
    ids=lambda command: command[0] + command[-1].replace("{run}", ""),
)
def test_a_run_that_is_held_is_left_alone(command: tuple[str, ...], run_copy: RunFolder, digits_teacher: Path) -> None:
    with holder(run_copy.path) as process:
        before = files_of(run_copy.path)
        outcome = run_command(*(word.format(run=run_copy.path, teacher=digits_teacher) for word in command))
        assert outcome.code == 2, outcome.err
        assert outcome.errors == [f"error: the run {run_copy.path} is in use by process {process.pid}"]
        assert files_of(run_copy.path) == before


def test_a_run_that_goes_on_is_neither_resumed_nor_replaced(digits_teacher: Path, tmp_path: Path) -> None:
    """The real command, from its first step to what follows the training."""
    run = tmp_path / "run"
    start = ("distill", digits_teacher, "--student", QUICK_STUDENT, "--out", run)
    small = ("--set", "batch_size=8", "--steps", 100_000, "--set", "log.checkpoint_minutes=1e-6", "--no-compile")
    with command_process(*start, *small) as process:
        assert process.stderr is not None
        assert any(line.startswith("step ") for line in process.stderr)
        for command in (("distill", "--resume", run), (*start, "--force"), start):
            outcome = run_command(*command)
            assert outcome.code == 2
            if command is not start:
                assert f"in use by process {process.pid}" in outcome.errors[0]
        process.send_signal(signal.SIGINT)
        assert finish_command(process).code == 130
    assert RunFolder(run).record()["status"] == "interrupted"
    with locked(run):
        pass


def test_two_new_runs_do_not_share_a_folder(digits_teacher: Path, tmp_path: Path) -> None:
    """Also before either has written anything."""
    run = tmp_path / "new" / "run"

    def find_nothing_to_do() -> None:
        with reserved_folder(run, force=False):
            assert [path.name for path in run.iterdir()] == [LOCK]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_nothing_to_do()
    assert list(tmp_path.iterdir()) == []
    run.mkdir(parents=True)
    with holder(run) as process:
        outcome = run_command("distill", digits_teacher, "--student", QUICK_STUDENT, "--out", run)
    assert outcome.code == 2
    assert f"in use by process {process.pid}" in outcome.errors[0]


@pytest.mark.parametrize("way", ["direct", "link to the folder", "link in the folder"])
@pytest.mark.parametrize("what", ["--data", "--baseline", "--recipe", "student.weights", "the teacher"])
def test_force_deletes_no_input_of_the_new_run(
    what: str, way: str, run_copy: RunFolder, digits_teacher: Path, digits_data: Path, tmp_path: Path
) -> None:
    source = {
        "--data": digits_data,
        "--recipe": run_copy.recipe,
        "student.weights": run_copy.student,
        "the teacher": digits_teacher,
    }
    inside = run_copy.path / ("input" + {"--data": ".npz", "--baseline": ".npz", "--recipe": ".toml"}.get(what, ".st"))
    if what == "--baseline":
        assert run_command("baseline", run_copy.path, "-o", inside).code == 0
    else:
        shutil.copy(source[what], inside)
    given = inside
    if way == "link to the folder":
        (tmp_path / "link").symlink_to(run_copy.path)
        given = tmp_path / "link" / inside.name
    elif way == "link in the folder":
        shutil.move(inside, tmp_path / inside.name)
        inside.symlink_to(tmp_path / inside.name)
    flags = {
        "--data": ("--data", given),
        "--baseline": ("--baseline", given),
        "--recipe": ("--recipe", given),
        "student.weights": ("--set", f"student.weights={given}"),
        "the teacher": (),
    }
    teacher = given if what == "the teacher" else digits_teacher
    before = files_of(run_copy.path)
    outcome = run_command(
        *("distill", teacher, "--student", QUICK_STUDENT, "--steps", 1, "--out", run_copy.path, "--force"),
        *("--export", "onnx", *flags[what]),
    )
    assert outcome.code == 2
    assert outcome.errors == [f"error: {what} {given} lies in the output folder {run_copy.path}"]
    assert {**files_of(run_copy.path), LOCK: b""} == {**before, LOCK: b""}


@pytest.fixture
def read_only_run(finished_run: RunFolder) -> Iterator[RunFolder]:
    """A run that everybody can read and nobody but its owner can write."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(finished_run.path, Path(folder) / "run")
        for path in (Path(folder) / "run", *(Path(folder) / "run").rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield RunFolder(Path(folder) / "run")
        for path in (Path(folder) / "run").rglob("*"):
            path.chmod(0o755)
        (Path(folder) / "run").chmod(0o755)


@pytest.mark.parametrize(("command", "has_lock_file"), [("verify", True), ("report", False)])
def test_a_run_that_cannot_be_written_is_verified_all_the_same(
    command: str, has_lock_file: bool, read_only_run: RunFolder
) -> None:
    if not has_lock_file:
        read_only_run.path.chmod(0o755)
        (read_only_run.path / LOCK).unlink(missing_ok=True)
        read_only_run.path.chmod(0o555)
    before = files_of(read_only_run.path)
    with command_process(command, read_only_run.path, "--json", preamble=UNPRIVILEGED) as process:
        outcome = finish_command(process)
    assert outcome.code == 0, outcome.err
    assert "is not writable here" in outcome.out
    assert files_of(read_only_run.path) == before


def test_a_run_that_cannot_be_written_is_not_exported(read_only_run: RunFolder) -> None:
    with command_process("export", read_only_run.path, "-e", "onnx", preamble=UNPRIVILEGED) as process:
        outcome = finish_command(process)
    assert outcome.code == StorageFailed.exit_code
    assert "cannot lock" in outcome.errors[0]


def test_the_lock_is_the_runs_own_file(run_copy: RunFolder, digits_teacher: Path) -> None:
    """--force keeps it, for it is held."""
    with locked(run_copy.path):
        before = (run_copy.path / LOCK).stat().st_ino
    np.savez(run_copy.path / "more.npz", a=np.zeros(1))
    tiny = ("--steps", 1, "--batch-size", 2, "--set", "verify.num_samples=24", "--export", "onnx")
    start = ("distill", digits_teacher, "--student", QUICK_STUDENT, "--out", run_copy.path, "--force")
    assert run_command(*start, *tiny).code in (0, 3)
    assert (run_copy.path / LOCK).stat().st_ino == before
    assert not (run_copy.path / "more.npz").exists()
