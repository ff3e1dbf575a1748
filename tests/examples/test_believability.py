"""The believability example: students are made, damaged and measured, and the relation is found where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import run_script
from scipy.stats import norm

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "believability"


def run(script: str, *arguments: object) -> str:
    done = run_script(FOLDER / script, *arguments)
    assert done.code == 0, done.err
    return done.out


@pytest.mark.example
def test_students_are_made_damaged_and_asked_once(digits_teacher: Path, digits_data: Path, tmp_path: Path) -> None:
    given = (digits_teacher, "--student", "compact_resnet_8", "--data", digits_data, "--out", tmp_path)
    made = (*given, "--scale", 0.02, "--only", "auto-seed1", "dfad")
    names = [line.split()[0] for line in run("make_students.py", *made).splitlines()]
    assert names == [
        *("auto-seed1-1", "auto-seed1-2", "auto-seed1-4", "auto-seed1-8"),
        *("auto-seed1-8-noise0.1", "auto-seed1-8-noise0.2", "auto-seed1-8-noise0.3", "auto-seed1-8-noise0.45"),
        *("auto-seed1-8-prune0.4", "auto-seed1-8-prune0.6", "auto-seed1-8-bits3", "dfad-2", "dfad-6"),
    ]
    asked = (digits_teacher, "--out", tmp_path, "--samples", 192, "--prior-steps", 2, "--adversary-steps", 1)
    assert sorted(line.split()[0] for line in run("ask_students.py", *asked).splitlines()) == sorted(names)
    with (
        np.load(tmp_path / "auto-seed1-8-prune0.6.npz") as stored,
        np.load(tmp_path / "auto-seed1-8.npz") as whole,
        np.load(tmp_path / "dfad-6.npz") as other,
    ):
        assert stored["sources"].tolist() == ["generator", "snapshots", "prior", "adversary"]
        assert np.bincount(stored["source"]).tolist() == [32, 32, 96, 32]
        asked_the_same = stored["source"] < 3  # an adversary looks at its student
        answers = [each["teacher_logits"][asked_the_same] for each in (stored, whole, other)]
        np.testing.assert_array_equal(answers[0], answers[1])
        np.testing.assert_array_equal(answers[0][64:], answers[2][64:])  # one prior generator for all
        assert (answers[0][:64] != answers[2][:64]).any()  # a generator and its snapshots for each run
        assert (stored["student_logits"][asked_the_same] != whole["student_logits"][asked_the_same]).any()
    assert run("make_students.py", *made) == run("ask_students.py", *asked) == ""  # nothing is done twice


def invent(folder: Path, *, over: float = 0.0) -> Path:
    """Students of which `prior` tells the accuracy, on a curve on probit axes above chance, and `generator` nothing.

    Args:
        folder: to make.
        over: how much better `prior` has them than they are.
    """

    def curve(share: float) -> float:
        """The agreement that 0.2 x² + 1.2 x + 0.3 takes to a share of the teacher's accuracy."""
        above_chance = norm.ppf((share - 0.1) / 0.9)
        x = (-1.2 + (1.2**2 - 4 * 0.2 * (0.3 - above_chance)) ** 0.5) / (2 * 0.2)
        return float(0.1 + 0.9 * norm.cdf(x))

    dice, num = np.random.default_rng(0), 4000
    folder.mkdir()
    for index, accuracy in enumerate(np.linspace(0.2, 0.85, 24)):
        agreement = {"generator": dice.uniform(0.3, 0.9), "prior": curve(accuracy / 0.9)}
        student = np.zeros((2 * num, 10), np.float32)
        teacher = student + np.eye(10, dtype=np.float32)[0]
        for start, rate in zip((0, num), agreement.values(), strict=True):
            right = round(rate * num)
            student[start : start + right, 0] = 1
            student[start + right : start + num, 1] = 1
        np.savez(
            folder / f"student{index:02}.npz",
            source=np.repeat(np.array([0, 1], np.int8), num),
            sources=np.array(list(agreement)),
            teacher_logits=teacher,
            student_logits=student,
            accuracy=np.array(accuracy - over),
            teacher_accuracy=np.array(0.9),
        )
    return folder


def cells(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]


def test_a_relation_is_found_where_there_is_one(tmp_path: Path) -> None:
    printed = run("relate.py", invent(tmp_path / "invented"), "--plot", tmp_path / "plot.png")
    rows, luck = ({row[2]: row for row in cells(printed) if len(row) == n and row[1] == "invented"} for n in (10, 9))
    assert rows["prior"][3] == "12 + 12"
    assert float(rows["prior"][5]) == 1.0
    assert float(rows["prior"][6]) < 0.2  # points
    assert float(rows["generator"][6]) > 5
    assert "choosing halves: prior" in printed
    assert luck["prior"][3] == "0.23"  # e / (9 + e)
    assert luck["prior"][4:6] == ["1.000", "1.000 (1.00 to 1.00)"]
    assert float(luck["prior"][6].split()[0]) < 0.2
    assert luck["prior"][7].endswith("(2 students)")
    assert float(luck["generator"][5].split()[0]) < 0.5
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_is_stated_on_students_that_had_no_say(tmp_path: Path) -> None:
    first, later = invent(tmp_path / "first"), invent(tmp_path / "later", over=0.05)
    row = cells(run("relate.py", first, "--confirm", later))[-1]
    assert row[1:5] == ["first", "prior", "24 + 24", "1.000"]
    assert float(row[5]) == 5.0
    assert float(row[6]) < 0.2
    assert 4.7 < float(row[7].split()[0]) < 5.3
    refused = run_script(FOLDER / "relate.py", first, "--confirm", later, later)
    assert refused.code == 2
    assert "one folder for each folder" in refused.err
