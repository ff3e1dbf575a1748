"""The Fashion-MNIST example: its script trains on idx files, and the teacher that is committed is what it says."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from command_line import run_script

from dfadc.networks.flops import count_parameters
from dfadc.networks.network_file import load_network

if TYPE_CHECKING:
    from command_line import Outcome
    from conftest import Digits
    from numpy.typing import NDArray

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape)
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def train(*arguments: str | Path) -> Outcome:
    return run_script(EXAMPLE / "train_teacher.py", *arguments)


@pytest.fixture(scope="module")
def idx_folder(digits_split: tuple[Digits, Digits], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits, tripled to 24 px and framed to 28 px, as four idx files; the test pair is compressed."""
    folder = tmp_path_factory.mktemp("idx")
    for digits, prefix, suffix in zip(digits_split, ("train", "t10k"), ("", ".gz"), strict=True):
        images = np.pad(digits.images[:, 0].repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", digits.labels.astype(np.uint8))
    return folder


def test_the_script_trains_and_writes_a_teacher(idx_folder: Path, tmp_path: Path) -> None:
    teacher, images = tmp_path / "teacher.safetensors", tmp_path / "test.npz"
    done = train(
        *("--data", idx_folder, "--architecture", "compact_resnet_8", "--epochs", "2", "--batch-size", "32"),
        *("--out", teacher, "--write-evaluation", images),
    )
    assert done.code == 0, done.err
    accuracy = float(done.out.partition("test accuracy ")[2].partition("%")[0])
    assert accuracy > 40  # of mirrored, shifted digits after two epochs: images and labels belong together
    module, metadata = load_network(teacher)
    assert metadata.architecture == "compact_resnet_8"
    assert metadata.extra["dfadc.training"].startswith("2 epochs, batch 32, ")
    assert module(torch.zeros(2, *metadata.contract.input_size)).shape == (2, 10)
    with np.load(images) as written:
        assert written["images"].shape == (397, 1, 28, 28)
        assert written["images"].dtype == np.uint8


def test_a_missing_idx_file_is_named(idx_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").symlink_to(idx_folder / "train-images-idx3-ubyte")
    done = train("--data", tmp_path, "--out", tmp_path / "teacher.safetensors")
    assert done.code == 2
    assert "train-labels-idx1-ubyte" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("name", "num_parameters", "has_batch_norm", "least"),
    [("teacher", 693_370, True, 0.92), ("teacher_lenet5", 61_706, False, 0.9)],
)
def test_the_committed_teachers_are_what_they_say(
    name: str, num_parameters: int, has_batch_norm: bool, least: float
) -> None:
    module, metadata = load_network(EXAMPLE / f"{name}.safetensors")
    contract = metadata.contract
    assert contract.input_size == (1, 28, 28)
    assert contract.class_names is not None
    assert contract.class_names[9] == "Ankle boot"
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in module.modules()) is has_batch_norm
    assert count_parameters(module) == num_parameters
    with np.load(EXAMPLE / "test_2000.npz") as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    assert len(images) == len(labels) == 2000
    assert contract.mean is not None
    assert contract.std is not None
    with torch.no_grad():
        logits = module((images[:500].float() / 255 - contract.mean[0]) / contract.std[0])
    assert (logits.argmax(1) == labels[:500]).double().mean() >= least  # a point or more above it on all 10,000


def test_each_architecture_has_a_training_and_a_file_of_its_own(idx_folder: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "lenet5.safetensors"
    done = train("--data", idx_folder, "--architecture", "lenet5", "--epochs", "1", "--out", teacher)
    assert done.code == 0, done.err
    said = load_network(teacher)[1].extra["dfadc.training"]
    assert "1 epochs, batch 128, rate 0.05, shift 2, flips, 0% erased, seed 0" in said


def test_the_test_images_are_written_for_evaluation(idx_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "test.npz"
    done = run_script(EXAMPLE / "write_test_images.py", "--data", idx_folder, "--out", out, "--count", 7)
    assert done.code == 0, done.err
    with np.load(out) as test:
        assert test["images"].shape == (7, 1, 28, 28)
        assert test["images"].dtype == np.uint8
        assert test["labels"].shape == (7,)
        seen = test["images"].copy()
    train = (*("--data", idx_folder, "--split", "train"), *("--out", out, "--count", 7))
    assert run_script(EXAMPLE / "write_test_images.py", *train).code == 0
    with np.load(out) as others:
        assert others["labels"].shape == (7,)
        assert (others["images"] != seen).any(axis=(1, 2, 3)).all()
