"""The segmentation example: scenes are what their masks say, the script trains, the committed teacher is as told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from command_line import run_script
from test_fashion_mnist import write_idx

from dfadc.evaluation.masks import load_masked_images
from dfadc.networks.logits import answering_pixels
from dfadc.networks.network_file import load_network
from dfadc.run_folder import SCHEMA
from dfadc.verification.pixel_scores import PixelScores

if TYPE_CHECKING:
    from command_line import Outcome
    from conftest import Digits

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "segmentation"


def run(script: str, *arguments: str | Path) -> Outcome:
    return run_script(EXAMPLE / script, *arguments)


@pytest.fixture(scope="module")
def idx_folder(digits_split: tuple[Digits, Digits], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits, tripled to 24 px and framed to 28 px, as four idx files."""
    folder = tmp_path_factory.mktemp("idx")
    for digits, prefix in zip(digits_split, ("train", "t10k"), strict=True):
        images = np.pad(digits.images[:, 0].repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", digits.labels.astype(np.uint8))
    return folder


def test_scenes_are_masked_where_they_are_drawn(idx_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scenes.npz"
    done = run("scenes.py", "--data", idx_folder, "--count", "20", "--out", out)
    assert done.code == 0, done.err
    with np.load(out) as scenes:
        images, masks = scenes["images"], scenes["masks"]
    assert images.shape == (20, 1, 64, 64)
    np.testing.assert_array_equal(masks > 0, images[:, 0] > 16)
    assert all(2 <= len(np.unique(mask)) <= 5 for mask in masks)


def test_the_script_trains_and_writes_a_teacher(idx_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher.safetensors"
    done = run(
        *("train_segmenter.py", "--data", idx_folder, "--architecture", "compact_unet_8"),
        *("--steps", "4", "--batch-size", "4", "--test-scenes", "8", "--out", out),
    )
    assert done.code == 0, done.err
    assert "mean IoU" in done.out
    module, metadata = load_network(out)
    assert metadata.contract.task == "segmentation"
    assert "4 steps of 4 scenes, seed 0" in metadata.extra["dfadc.training"]
    assert module(torch.zeros(1, 1, 64, 64)).shape == (1, 11, 32, 32)


def test_the_committed_teacher_is_what_it_says() -> None:
    module, metadata = load_network(EXAMPLE / "teacher.safetensors")
    data = load_masked_images(EXAMPLE / "scenes_200.npz", metadata.contract)
    network = answering_pixels(module, metadata.contract).eval()
    with torch.no_grad():
        scores = PixelScores.of(data.judge(network(torch.from_numpy(batch)).numpy() for batch in data.batches(50)))
    assert scores.num_images == 200
    assert scores.accuracy >= 0.94  # 95.2% and a mean IoU of 78.0% on 1,000 other scenes
    assert scores.mean_iou >= 0.74


@pytest.mark.example
def test_a_student_is_measured_against_masks_and_teacher(tmp_path: Path) -> None:
    """The teacher as its own student: it agrees with itself, and is as right as itself."""
    teacher = EXAMPLE / "teacher.safetensors"
    contract = load_network(teacher)[1].contract
    (tmp_path / "student.safetensors").symlink_to(teacher)
    (tmp_path / "run.json").write_text(json.dumps({"schema": SCHEMA, "contract": contract.to_dict()}))
    done = run("measure_student.py", tmp_path)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line[:24] for line in lines] == [
        "teacher, with the masks ",
        "student, with the masks ",
        "student, with the teache",
    ]
    assert lines[0][26:] == lines[1][26:]
    assert lines[2].endswith("100.00% [100.00%, 100.00%]  mean IoU 100.00%")


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    done = run("scenes.py", "--data", tmp_path)
    assert done.code == 2
    assert "t10k-images-idx3-ubyte" in done.err
    assert "Traceback" not in done.err
