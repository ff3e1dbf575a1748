"""The Python API: the same stages as the command, and the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from conftest import QUICK_RECIPE, QUICK_STUDENT

import dfadc

if TYPE_CHECKING:
    from pathlib import Path

    from command_line import Outcome

    from dfadc.run_folder import RunFolder

ONE_STEP = [f"{path}={value}" for path, value in {**QUICK_RECIPE, "steps": 1, "verify.num_samples": 24}.items()]


def test_every_public_name_can_be_had() -> None:
    for name in dfadc.__all__:
        assert getattr(dfadc, name) is not None


def test_importing_dfadc_loads_nothing_heavy() -> None:
    program = "import sys, dfadc; print(*(name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules))"
    done = subprocess.run(  # noqa: S603 -- our own interpreter
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "file", ["student.safetensors", "generator.safetensors", "calibration.npz", "samples.npz", "artifacts/student.onnx"]
)
def test_the_api_makes_the_bytes_that_the_command_makes(
    finished_run: RunFolder, command_run: tuple[RunFolder, Outcome], file: str
) -> None:
    """The command was given labelled images besides: they evaluate, and change nothing."""
    assert (finished_run.path / file).read_bytes() == (command_run[0].path / file).read_bytes()


def test_ten_lines_do_what_the_command_does(digits_teacher: Path, tmp_path: Path) -> None:
    teacher = dfadc.load_teacher(digits_teacher)
    recipe = dfadc.load_recipe("auto", ONE_STEP)
    run = dfadc.run_distillation(teacher, QUICK_STUDENT, out=tmp_path / "run", recipe=recipe)
    exported = dfadc.export_student(run, ["onnx"])
    report = dfadc.verify_run(run)
    assert any(note.startswith("the prior generator had ") for note in report["notes"])
    assert [result.path for result in exported] == [tmp_path / "run" / "artifacts" / "student.onnx"]
    assert report["artifacts"]["student.onnx"]["comparisons"]["A"]["all"]["agreement"] == 1.0
    assert report == json.loads(run.report_json.read_text())
    alone = dfadc.verify_file(exported[0].path, run.samples)
    for comparison in ("A", "B"):
        measured = alone["artifacts"]["student.onnx"]["comparisons"][comparison]
        assert measured == report["artifacts"]["student.onnx"]["comparisons"][comparison]


def test_an_observer_is_told_the_plan_and_every_reading(digits_teacher: Path, tmp_path: Path) -> None:
    told: list[str] = []
    observer = dfadc.Observer(
        on_plan=lambda plan: told.append(f"plan of {plan.recipe.steps}"),
        on_reading=lambda reading: told.append(f"step {reading.step} of {reading.steps}"),
    )
    recipe = dfadc.load_recipe("auto", [*ONE_STEP, "steps=3", "log.interval=2"])
    run = dfadc.run_distillation(digits_teacher, QUICK_STUDENT, out=tmp_path / "run", recipe=recipe, observer=observer)
    # The last step is read whatever the interval.
    assert told == ["plan of 3", "step 2 of 3", "step 3 of 3"]
    assert [line["step"] for line in run.read_metrics()] == [2, 3]


def test_a_plan_writes_nothing(digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = dfadc.load_teacher(digits_teacher)
    plan = dfadc.plan_distillation(teacher, QUICK_STUDENT, recipe=dfadc.load_recipe("auto", ONE_STEP))
    assert plan.images == plan.recipe.batch_size * (2 + plan.recipe.replay.repeats + 1)
    assert plan.estimate.seconds_per_step > 0
    assert list(tmp_path.iterdir()) == []


def test_a_plan_turns_minutes_into_steps(digits_teacher: Path) -> None:
    plan = dfadc.plan_distillation(
        dfadc.load_teacher(digits_teacher), QUICK_STUDENT, recipe=dfadc.load_recipe("auto", ONE_STEP), minutes=1
    )
    assert plan.recipe.steps == pytest.approx(60 / plan.estimate.seconds_per_step, abs=1)
    assert plan.seconds == pytest.approx(60, rel=0.1)


def test_a_run_works_outside_the_main_thread(digits_teacher: Path, tmp_path: Path) -> None:
    """Signals belong to the main thread; a service that distils in another one gets no error for it."""
    recipe = dfadc.load_recipe("auto", ONE_STEP)
    thread = threading.Thread(
        target=dfadc.run_distillation,
        args=(digits_teacher, QUICK_STUDENT),
        kwargs={"out": tmp_path / "run", "recipe": recipe},
    )
    thread.start()
    thread.join()
    assert dfadc.open_run(tmp_path / "run").record()["status"] == "finished"


def test_errors_are_of_one_family_and_know_their_exit_code(tmp_path: Path) -> None:
    with pytest.raises(dfadc.DfadcError, match="not a run folder") as caught:
        dfadc.open_run(tmp_path)
    assert caught.value.exit_code == 2
