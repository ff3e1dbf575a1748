"""Interrupted runs: what was computed is kept, and going on gives what an uninterrupted run gives, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from command_line import command_process, disk_that_holds, files_of, finish_command, run_command, settings
from conftest import QUICK_RECIPE, QUICK_STUDENT

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError, Interrupted
from dfadc.pipeline.distill import Observer, load_teacher, resume_distillation, run_distillation
from dfadc.pipeline.export import export_student
from dfadc.recipe.load import change_recipe, load_recipe
from dfadc.run_folder import RunFolder, open_run
from dfadc.storage import sha256_file

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from command_line import Outcome

    from dfadc.training.callbacks import Reading

#: Minutes between checkpoints that make every step write one.
ALWAYS = 1e-6
STEPS = 16
#: Half as long and a third of the updates. What its student is worth is not asked.
SHORT_RECIPE = {
    **QUICK_RECIPE,
    "steps": STEPS,
    "batch_size": 8,
    "replay.repeats": 2,
    "verify.num_samples": 64,
    "verify.min_agreement": 0.0,
    "verify.min_fp16_agreement": "off",
    "verify.min_int8_agreement": "off",
}


def read_until(process: subprocess.Popen[str], beginning: str) -> str:
    """What a process says on stderr up to a line that begins so."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(beginning):
            return "".join(said)
    raise AssertionError(f"ended without {beginning!r}: {''.join(said)}")


@pytest.fixture(scope="module")
def whole_run(digits_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """What the interrupted runs of this file have to become."""
    recipe = load_recipe("auto", [f"{path}={value}" for path, value in SHORT_RECIPE.items()])
    run = run_distillation(digits_teacher, QUICK_STUDENT, out=tmp_path_factory.mktemp("whole") / "run", recipe=recipe)
    export_student(run, ["onnx"])
    return run


@pytest.fixture(scope="module")
def stopped_runs(
    whole_run: RunFolder, digits_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[signal.Signals, tuple[RunFolder, Outcome]]:
    """That run begun again in processes of their own, each stopped by another signal after its first steps."""

    def start_and_stop(number: signal.Signals) -> tuple[RunFolder, Outcome]:
        run = RunFolder(tmp_path_factory.mktemp(number.name) / "run")
        arguments = ("distill", digits_teacher, "--student", QUICK_STUDENT, "--recipe", whole_run.recipe)
        often = ("--set", f"log.checkpoint_minutes={ALWAYS}")
        with command_process(*arguments, *often, "--out", run.path) as process:
            said = read_until(process, f"step 1/{STEPS}")
            wanted = run.checkpoints / "previous.pt"
            while number == signal.SIGKILL and not wanted.exists() and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
            return run, finish_command(process, already_read=said)

    signals = (signal.SIGINT, signal.SIGKILL)
    with ThreadPoolExecutor() as pool:
        return dict(zip(signals, pool.map(start_and_stop, signals), strict=True))


@pytest.fixture(scope="module")
def interrupted_at_five(
    whole_run: RunFolder, digits_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """The same, interrupted in this process after five steps, with two checkpoints. Tests copy it."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    recipe = change_recipe(load_recipe(whole_run.recipe), {"log.checkpoint_minutes": ALWAYS})

    def interrupt(reading: Reading) -> None:
        if reading.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="interrupted at step 5 of") as caught:
        run_distillation(digits_teacher, QUICK_STUDENT, out=out, recipe=recipe, observer=Observer(on_reading=interrupt))
    assert caught.value.exit_code == 130
    return RunFolder(out)


@pytest.fixture
def interrupted(interrupted_at_five: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the run that stopped at step five."""
    shutil.copytree(interrupted_at_five.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def assert_same_results(run: RunFolder, uninterrupted: RunFolder) -> None:
    for name in ("student.safetensors", "generator.safetensors", "calibration.npz", "samples.npz"):
        assert (run.path / name).read_bytes() == (uninterrupted.path / name).read_bytes(), name
    ours, theirs = (list(each.read_metrics()) for each in (run, uninterrupted))
    for name in ("step", "student_loss", "generator_loss", "terms", "class_entropy", "agreement", "student_rate"):
        assert [line[name] for line in ours] == [line[name] for line in theirs], name
    assert run.record()["status"] == "finished"
    assert not run.checkpoints.exists()


def test_ctrl_c_saves_and_resume_finishes(
    stopped_runs: dict[signal.Signals, tuple[RunFolder, Outcome]], whole_run: RunFolder
) -> None:
    run, outcome = stopped_runs[signal.SIGINT]
    assert outcome.code == 130
    assert len(outcome.errors) == 1
    assert "the state is saved" in outcome.errors[0]
    assert outcome.hints == [f"hint: dfadc distill --resume {run.path}"]
    assert "Traceback" not in outcome.err
    assert run.record()["status"] == "interrupted"
    resumed = run_command("distill", "--resume", run.path, "--export", "onnx")
    # A student of 16 steps may fail its gates; on which CPU it does is not asked here.
    assert resumed.code in (0, 3), resumed.err
    assert "note: going on from step" in resumed.err
    assert_same_results(run, whole_run)
    onnx = "artifacts/student.onnx"
    assert (run.path / onnx).read_bytes() == (whole_run.path / onnx).read_bytes()


def test_sigterm_saves_too(whole_run: RunFolder, digits_teacher: Path, tmp_path: Path) -> None:
    """By the command in this process, which another thread asks to end."""
    run, ended = RunFolder(tmp_path / "run"), threading.Event()

    def ask_to_end() -> None:
        # Nobody is asked where the command ends before.
        while not ended.wait(0.01):
            if (run.checkpoints / "last.pt").exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    arguments = ("distill", digits_teacher, "--student", QUICK_STUDENT, "--recipe", whole_run.recipe)
    often = ("--set", f"log.checkpoint_minutes={ALWAYS}")
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # a run that does not listen fails the test and no more
    try:
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(ask_to_end)
            try:
                outcome = run_command(*arguments, *often, "--out", run.path)
            finally:
                ended.set()
            asked.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert outcome.code == 130
    assert len(outcome.errors) == 1
    assert_same_results(resume_distillation(run), whole_run)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    stopped_runs: dict[signal.Signals, tuple[RunFolder, Outcome]], whole_run: RunFolder
) -> None:
    run, outcome = stopped_runs[signal.SIGKILL]
    assert outcome.code == -signal.SIGKILL
    assert run.record()["status"] == "running"
    assert not run.student.exists()
    leftover, of_the_user = run.checkpoints / ".last.pt.k3_9zz0a.pt", run.path / ".gitignore"
    leftover.touch()
    of_the_user.touch()
    assert_same_results(resume_distillation(run), whole_run)
    assert not leftover.exists()
    assert of_the_user.exists()


def test_a_run_interrupted_twice_is_still_the_same(interrupted: RunFolder, whole_run: RunFolder) -> None:
    before = interrupted.record()["seconds"]

    def interrupt(reading: Reading) -> None:
        if reading.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 7 of"):
        resume_distillation(interrupted, observer=Observer(on_reading=interrupt))
    assert interrupted.record()["seconds"] > before
    assert_same_results(resume_distillation(interrupted), whole_run)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(interrupted: RunFolder, whole_run: RunFolder) -> None:
    last = interrupted.checkpoints / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    told: list[str] = []
    resume_distillation(interrupted, observer=Observer(on_plan=lambda plan: told.extend(plan.notes)))
    assert told[-1] == f"going on from step 4 of {STEPS}"
    assert_same_results(interrupted, whole_run)


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(interrupted: RunFolder, whole_run: RunFolder) -> None:
    """The limit on a file's size lets the small files through, and no checkpoint."""
    last = interrupted.checkpoints / "last.pt"
    kept = last.read_bytes()
    with disk_that_holds(len(kept) // 2):
        outcome = run_command("distill", "--resume", interrupted.path)
    assert outcome.code == 7, outcome.err
    assert len(outcome.errors) == 1
    assert str(last) in outcome.errors[0]
    assert len(outcome.hints) == 1
    assert "Traceback" not in outcome.err
    assert interrupted.record()["status"] == "failed"
    assert kept in (last.read_bytes(), (interrupted.checkpoints / "previous.pt").read_bytes())
    assert [path.name for path in interrupted.checkpoints.iterdir() if path.name.startswith(".")] == []
    assert_same_results(resume_distillation(interrupted), whole_run)


def test_a_run_that_diverges_says_so_and_can_be_gone_on_with(digits_teacher: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    rates = {"student.optimizer.learning_rate": 100, "student.optimizer.clip_norm": 0, "student.l1": 1e6}
    recipe = {**SHORT_RECIPE, **rates, "steps": 60, "student.inherit": "off"}
    outcome = run_command(
        *("distill", digits_teacher, "--student", QUICK_STUDENT, "--out", run.path), *settings(recipe)
    )
    assert outcome.code == 6, outcome.err
    assert run.record()["status"] == "diverged"
    assert run.record()["seconds"] > 0


def test_a_run_that_ends_while_it_is_finished_says_so(interrupted: RunFolder, whole_run: RunFolder) -> None:
    def stop(note: str) -> None:
        if note.startswith("finishing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume_distillation(interrupted, observer=Observer(on_note=stop))
    assert interrupted.record()["status"] == "interrupted"
    assert_same_results(resume_distillation(interrupted), whole_run)


def test_resume_says_what_is_another_machine_s(interrupted: RunFolder) -> None:
    record = interrupted.record()
    assert record["threads"] == 1
    interrupted.update_record({"threads": 64, "precision": "bf16 (the CPU has AMX)"})
    told: list[str] = []

    def interrupt(_: Reading) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    observer = Observer(on_plan=lambda plan: told.extend((*plan.notes, plan.precision)), on_reading=interrupt)
    with pytest.raises(Interrupted):
        resume_distillation(interrupted, observer=observer)
    assert "precision fp32 instead of bf16, threads 1 instead of 64: the rest of the run" in told[-3]
    assert told[-1] == "fp32 (as asked)"


def test_resume_needs_the_start_weights_no_more(
    whole_run: RunFolder, digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are named from where the command stood, and are in the checkpoint."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "start.safetensors"
    shutil.copy(whole_run.student, weights)
    sha256 = sha256_file(weights)
    recipe = change_recipe(load_recipe(whole_run.recipe), {"student.weights": "start.safetensors", "steps": 4})
    whole = run_distillation(digits_teacher, QUICK_STUDENT, out=tmp_path / "whole", recipe=recipe)
    assert whole.record()["student"]["weights"] == {"path": str(weights), "sha256": sha256}

    def interrupt(reading: Reading) -> None:
        if reading.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run_distillation(
            digits_teacher,
            QUICK_STUDENT,
            out=tmp_path / "run",
            recipe=recipe,
            observer=Observer(on_reading=interrupt),
        )
    weights.unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same_results(resume_distillation(RunFolder(tmp_path / "run")), whole)


def test_resume_refuses_a_teacher_that_changed(interrupted: RunFolder, whole_run: RunFolder, tmp_path: Path) -> None:
    before = files_of(interrupted.path)
    outcome = run_command("distill", whole_run.student, "--resume", interrupted.path)
    assert outcome.code == 2
    assert "the teacher changed since the run" in outcome.errors[0]
    moved = tmp_path / "moved.safetensors"
    shutil.copy(interrupted.record()["teacher"]["path"], moved)
    moved.write_bytes(moved.read_bytes()[:-1] + b"\x7f")
    interrupted.update_record({"teacher": {**interrupted.record()["teacher"], "path": str(moved)}})
    outcome = run_command("distill", "--resume", interrupted.path)
    assert outcome.code == 2
    assert str(moved) in outcome.errors[0]
    assert {**files_of(interrupted.path), "run.json": b""} == {**before, "run.json": b""}


def test_resume_finds_a_teacher_that_moved_where_it_is_told(interrupted: RunFolder, tmp_path: Path) -> None:
    teacher = interrupted.record()["teacher"]
    there = tmp_path / "there.safetensors"
    shutil.copy(teacher["path"], there)
    interrupted.update_record({"teacher": {**teacher, "path": str(tmp_path / "gone.safetensors")}})
    outcome = run_command("distill", "--resume", interrupted.path)
    assert outcome.code == 2
    assert str(tmp_path / "gone.safetensors") in outcome.errors[0]
    assert f"dfadc distill TEACHER --resume {interrupted.path}" in outcome.hints[0]

    def interrupt(_: Reading) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 6 of"):
        resume_distillation(interrupted, there, observer=Observer(on_reading=interrupt))


def test_resume_refuses_a_teacher_loaded_in_another_way(interrupted: RunFolder) -> None:
    path = interrupted.record()["teacher"]["path"]
    with pytest.raises(DfadcError, match="another contract"):
        resume_distillation(interrupted, load_teacher(path, fields=ContractFields(input_size=(1, 16, 16))))


def test_resume_refuses_a_finished_run(whole_run: RunFolder) -> None:
    before = files_of(whole_run.path)
    outcome = run_command("distill", "--resume", whole_run.path)
    assert outcome.code == 2
    assert outcome.errors == [f"error: the run {whole_run.path} is finished"]
    assert len(outcome.hints) == 1
    assert files_of(whole_run.path) == before


@pytest.mark.parametrize(
    "flags",
    [
        ("--steps", "3"),
        ("--set", "steps=3"),
        ("--student", "compact_resnet_4"),
        ("--recipe", "dfad"),
        ("--device", "cpu"),
        ("--seed", "0"),
        ("--no-compile",),
        ("--dry-run",),
        ("--force",),
        ("--out", "elsewhere"),
        ("--input-size", "1x8x8"),
        ("--minutes", "1"),
    ],
    ids=" ".join,
)
def test_resume_refuses_what_it_would_ignore(interrupted_at_five: RunFolder, flags: tuple[str, ...]) -> None:
    outcome = run_command("distill", "--resume", interrupted_at_five.path, *flags)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith(f"error: {'--compile' if flags[0] == '--no-compile' else flags[0]} cannot be")
    assert interrupted_at_five.record()["status"] == "interrupted"


def test_resume_needs_a_checkpoint_that_fits(interrupted: RunFolder) -> None:
    recipe = change_recipe(load_recipe(interrupted.recipe), {"generator.latent_dim": 7})
    original = interrupted.recipe.read_text()
    interrupted.recipe.write_text(original.replace("latent_dim = 256", f"latent_dim = {recipe.generator.latent_dim}"))
    outcome = run_command("distill", "--resume", interrupted.path)
    assert outcome.code == 2
    assert "does not fit the run's recipe" in outcome.errors[0]
    interrupted.recipe.write_text(original)
    for checkpoint in interrupted.checkpoints.iterdir():
        checkpoint.unlink()
    outcome = run_command("distill", "--resume", interrupted.path)
    assert outcome.code == 2
    assert "it holds no checkpoint yet" in outcome.errors[0]


@pytest.mark.parametrize("command", ["export", "verify"])
def test_an_unwhole_run_has_nothing_to_export_or_verify(interrupted_at_five: RunFolder, command: str) -> None:
    outcome = run_command(command, interrupted_at_five.path)
    assert outcome.code == 2
    assert "is not finished" in outcome.errors[0]
    assert outcome.hints == [f"hint: dfadc distill --resume {interrupted_at_five.path}"]
    assert open_run(interrupted_at_five.path).record()["status"] == "interrupted"
