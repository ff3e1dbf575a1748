"""The comparison of calibration pools prints a row for each kind and preset, and names what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from command_line import run_script

if TYPE_CHECKING:
    from command_line import Outcome
    from conftest import Digits

    from dfadc.run_folder import RunFolder

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "compare_calibration.py"
KINDS = ["generated images", "uniform noise", "normal noise", "real images"]


def compare(*arguments: str | Path) -> Outcome:
    return run_script(SCRIPT, *arguments)


@pytest.fixture
def run(finished_run: RunFolder, tmp_path: Path) -> Path:
    """The finished run with so few calibration images that eight quantisations take no time."""
    shutil.copytree(finished_run.path, tmp_path / "run")
    with np.load(finished_run.calibration) as stored:
        np.savez(tmp_path / "run" / "calibration.npz", images=stored["images"][:64])
    return tmp_path / "run"


@pytest.fixture
def test_images(digits_split: tuple[Digits, Digits], tmp_path: Path) -> Path:
    path = tmp_path / "test.npz"
    np.savez(path, images=digits_split[1].images, labels=digits_split[1].labels)
    return path


@pytest.mark.example
def test_each_pool_and_preset_has_a_row(
    run: Path, digits_split: tuple[Digits, Digits], test_images: Path, tmp_path: Path
) -> None:
    train_images = tmp_path / "train.npz"
    np.savez(train_images, images=digits_split[0].images)
    done = compare(run, "--data", test_images, "--train-images", train_images)
    assert done.code == 0, done.err
    first, *_ = done.out.splitlines()
    assert first.startswith("fp32: ")
    assert first.endswith("of 397 images")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.out.splitlines() if "|" in line]
    header, _, *body = rows
    assert all(len(row) == len(header) for row in rows)
    assert [tuple(row[:2]) for row in body] == [(kind, preset) for kind in KINDS for preset in ("portable", "ort-cpu")]
    fp32 = float(first.split()[1].rstrip("%"))
    for row in body:
        if row[2] != "–":
            assert float(row[5].rstrip("%")) + float(row[6]) == pytest.approx(fp32, abs=0.011)


def test_images_of_another_size_are_refused(run: Path, test_images: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=np.zeros((20, 1, 28, 28), np.uint8))
    done = compare(run, "--data", test_images, "--train-images", tmp_path / "train.npz")
    assert done.code == 2
    assert "(1, 28, 28)" in done.err
    assert "Traceback" not in done.err
