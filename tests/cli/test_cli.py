"""The command line itself: its help, its lists, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from command_line import ROOT, files_of, run_command
from conftest import QUICK_STUDENT

import dfadc
from dfadc.cli.console import reading_line
from dfadc.recipe.load import describe_fields, recipe_names
from dfadc.recipe.schema import Recipe
from dfadc.training.callbacks import Reading

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = ("distill", "export", "verify", "baseline", "inspect", "students", "report", "recipe")
FASHION_MNIST_TEACHER = ROOT / "examples" / "fashion_mnist" / "teacher.safetensors"


def test_version() -> None:
    outcome = run_command("--version")
    assert outcome == (0, f"dfadc {dfadc.__version__}\n", "")


def test_no_arguments_show_the_help() -> None:
    outcome = run_command()
    shown = outcome.out + outcome.err
    for command in COMMANDS:
        assert command in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    outcome = run_command(command, "--help")
    assert outcome.code == 0
    assert f"dfadc {command}" in outcome.out
    assert outcome.err == ""


def test_recipes_are_listed_with_the_default_first() -> None:
    outcome = run_command("recipe", "list")
    assert outcome.code == 0
    assert re.findall(r"^│ ([\w+-]+) ", outcome.out, re.MULTILINE) == list(recipe_names())
    assert recipe_names()[0] == "auto"
    assert "dfad" in recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_shows_every_field_with_value_default_and_bounds(name: str) -> None:
    outcome = run_command("recipe", "show", name)
    assert outcome.code == 0
    for path, _, default, description in describe_fields():
        line = next(line for line in outcome.out.splitlines() if line.startswith(f"│ {path} "))
        assert default in line
        assert description in line
    assert f'"{name}"' in outcome.out


def test_a_recipe_file_is_shown_too(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("steps = 7\n")
    outcome = run_command("recipe", "show", tmp_path / "mine.toml")
    assert re.search(r"│ steps +│ 7 +│ 1000 ", outcome.out)
    assert Recipe().steps == 1000


def test_students_are_listed_with_parameters_flops_and_why_one_does_not_fit() -> None:
    outcome = run_command("students", "lenet5", "mobilenetv2", "--input-size", "1x28x28")
    assert outcome.code == 0
    lines = [line for line in outcome.out.splitlines() if line.startswith("│")]
    lenet, mobilenet = ([cell.strip() for cell in line.strip("│").split("│")] for line in lines)
    # Convolutions of 156 and 2,416 parameters, linear layers of 48,120, 10,164 and 850.
    assert lenet[:2] == ["lenet5", "0.06"]
    assert mobilenet[0] == "mobilenetv2"
    assert float(mobilenet[1]) == pytest.approx(2.24, abs=0.01)
    assert float(mobilenet[2]) > float(lenet[2]) > 0
    assert mobilenet[3] == "small"
    unfit = run_command("students", "lenet5", "--input-size", "1x8x8")
    assert unfit.code == 0
    assert re.search(r"│ lenet5 +│ – +│ – +│ LeNet5 takes 28 or 32 px", unfit.out)


def test_students_as_json() -> None:
    (row,) = json.loads(run_command("students", "lenet5", "--input-size", "1x28x28", "--json").out)
    assert row["num_parameters"] == 61706
    assert row["stem"] == "default"
    assert row["reason"] == ""


def test_an_unknown_student_cannot_be_listed() -> None:
    outcome = run_command("students", "lenet6")
    assert outcome.code == 2
    assert "lenet5" in outcome.hints[0]


@pytest.mark.slow  # builds all of torchvision on the meta device; tests/networks does it once already
def test_all_students_are_listed() -> None:
    listed = json.loads(run_command("students", "--json").out)
    assert all((row["reason"] == "") == (row["num_parameters"] is not None) for row in listed)
    assert {"lenet5_half", "resnet18_8x", "wrn_16_1"} <= {row["name"] for row in listed}


def test_inspect_tells_what_a_teacher_is() -> None:
    outcome = run_command("inspect", FASHION_MNIST_TEACHER)
    assert outcome.code == 0
    assert outcome.err == ""
    for shown in ("safetensors", "compact_resnet_48", "693,370", "safe: holds tensors only", "Ankle boot"):
        assert shown in outcome.out
    assert re.search(r"│ contract.input_size +│ 1, 28, 28 +\(metadata of the file\)", outcome.out)


def test_inspect_as_json() -> None:
    found = json.loads(run_command("inspect", FASHION_MNIST_TEACHER, "--json").out)
    assert found["architecture"] == "compact_resnet_48"
    assert found["num_parameters"] == 693370
    assert found["flops"] > 1e6
    assert found["contract"]["input_size"] == [1, 28, 28]
    assert all(layer["has_statistics"] for layer in found["norm_layers"])
    assert found["sha256"] == dfadc.load_teacher(FASHION_MNIST_TEACHER).sha256


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("distill", digits_teacher, "--student", QUICK_STUDENT, "--steps", 3, "--batch-size", 4, "--dry-run")
    outcome = run_command(*arguments)
    assert outcome.code == 0
    assert "plan: recipe auto, 3 steps of 15 student and 1 generator updates on 4 images: 192 images" in outcome.out
    assert "MiB of memory" in outcome.out
    assert "batch-norm layers: their statistics guide the generator" in outcome.out
    assert "  input_size = 1, 8, 8  (metadata of the file)" in outcome.err
    with_flags = run_command(*arguments, "--mean", "0.5", "--std", "0.25", "--json")
    assert "  std = 0.25  (command line)" in with_flags.err
    as_json = json.loads(with_flags.out)
    assert as_json["images"] == 192
    assert as_json["recipe"]["steps"] == 3
    assert as_json["device"] in {"cpu", "cuda:0", "cuda", "mps"}
    assert files_of(tmp_path) == {}


def test_a_reading_fits_a_line() -> None:
    reading = Reading(
        step=1,
        steps=2,
        student_loss=1.5,
        generator_loss=-0.5,
        terms={},
        class_entropy=0.25,
        agreement=0.5,
        collapse="",
        student_rate=0.1,
        generator_rate=0.1,
        images_per_second=1234.5,
        seconds_left=61.4,
    )
    assert reading_line(reading) == "loss 1.500  class entropy 0.25  agreement  50.0%  1,234 images/s  1:01 left"
    collapsed = replace(reading, class_entropy=0.0, agreement=1.0, collapse="collapsed: 1 class")
    assert reading_line(collapsed) == "loss 1.500  class entropy 0.00  collapsed: 1 class  1,234 images/s  1:01 left"
