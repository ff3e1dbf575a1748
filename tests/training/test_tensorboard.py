"""TensorBoard event files: the readings of metrics.jsonl, and no run that ends without them for want of a package."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from command_line import run_command

from dfadc.errors import StorageFailed
from dfadc.pipeline.distill import run_distillation
from dfadc.recipe.load import change_recipe, load_recipe
from dfadc.recipe.schema import LogSettings
from dfadc.run_folder import RunFolder
from dfadc.training.callbacks import Reading
from dfadc.training.tensorboard import event_files

if TYPE_CHECKING:
    from pathlib import Path

ON = LogSettings(tensorboard=True)
QUICK = {
    "steps": 3,
    "batch_size": 4,
    "student.steps": 1,
    "compute.compile": "off",
    "compute.precision": "fp32",
    "log.interval": 1,
    "log.tensorboard": True,
    "verify.num_samples": 24,
    "verify.gate_source": "generator",
}


def reading(step: int, note: str = "") -> Reading:
    terms = {"discrepancy": step / 2}
    return Reading(step, 9, 1 / step, -1.0, terms, 0.9, 0.8, "", 0.1, 0.01, 100.0, 0.0, note)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def event_paths(folder: Path) -> list[Path]:
    return list(folder.glob("events.out.tfevents.*"))


def test_a_run_writes_its_metrics_as_events(digits_teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = change_recipe(load_recipe("auto"), QUICK)
    run = run_distillation(digits_teacher, "compact_resnet_4", out=tmp_path / "run", recipe=recipe)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    found = scalars(run.path)
    names = {
        "loss/student": "student_loss",
        "loss/generator": "generator_loss",
        "probe/agreement": "agreement",
        "probe/class_entropy": "class_entropy",
        "learning_rate/student": "student_rate",
        "learning_rate/generator": "generator_rate",
        "speed/images_per_second": "images_per_second",
    }
    for tag, name in names.items():
        assert found[tag] == pytest.approx({line["step"]: line[name] for line in lines})
    for name in lines[0]["terms"]:
        assert found[f"generator_term/{name}"] == pytest.approx({line["step"]: line["terms"][name] for line in lines})


def test_without_the_setting_there_are_none(tmp_path: Path) -> None:
    told: list[Reading] = []
    with event_files(LogSettings(), RunFolder(tmp_path), 0, told.append) as on_reading:
        on_reading(reading(1))
    assert told == [reading(1)]
    assert event_paths(tmp_path) == []


def test_a_resumed_run_takes_the_place_of_what_was_lost(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    told: list[Reading] = []
    run = RunFolder(tmp_path)
    with event_files(ON, run, 0, told.append) as on_reading:
        for step in (1, 2, 3, 4):
            on_reading(reading(step, note="x" if step == 4 else ""))
    # The last checkpoint was written after step 2.
    with event_files(ON, run, 2, told.append) as on_reading:
        on_reading(reading(3))
    assert [found.step for found in told] == [1, 2, 3, 4, 3]
    assert len(event_paths(tmp_path)) == 2
    assert set(scalars(tmp_path)["loss/student"]) == {1, 2, 3}


def test_a_reading_that_was_told_is_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with event_files(ON, RunFolder(tmp_path), 0, lambda _: None) as on_reading:
        on_reading(reading(1))
        assert scalars(tmp_path)["probe/agreement"] == {1: pytest.approx(0.8)}


def test_a_missing_package_is_said_before_anything_is_done(
    digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    outcome = run_command("distill", digits_teacher, "--set", "log.tensorboard=true", "--out", tmp_path / "run")
    assert outcome.code == 4, outcome.err
    assert "log.tensorboard = true needs the package tensorboard" in outcome.err
    assert outcome.hints == ["hint: pip install 'dfadc[tensorboard]', or leave log.tensorboard away"]
    assert "plan:" not in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_a_storage_failure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "run").write_text("a file, not a folder")
    with (
        pytest.raises(StorageFailed, match="cannot write event files") as caught,
        event_files(ON, RunFolder(tmp_path / "run"), 0, lambda _: None),
    ):
        pass
    assert "--resume" in caught.value.hint
