"""Fixtures of several labels an image, all real: canvases of digits, a teacher of the digits on them, a run of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
from command_line import run_command, settings
from conftest import made_once
from sklearn.datasets import load_digits
from torch.nn import functional

import dfadc
from dfadc.contract import ImageContract
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import save_network

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from dfadc.run_folder import RunFolder

#: Label k: the digit k is on the canvas, at least once.
LABELS_CONTRACT = ImageContract(
    (1, 16, 16),
    5,
    mean=(0.22,),
    std=(0.34,),
    class_names=("zero", "one", "two", "three", "four"),
    task="multilabel",
)
#: What the teacher reaches in the mean of the labels on canvases of held-out digits before any test may rely on it.
LABEL_ACCURACY = 0.93
NUM_STEPS = 300
QUICK_LABELS = {
    "steps": 24,
    "batch_size": 32,
    "student.steps": 3,
    "student.ema_decay": 0.9,
    "replay.repeats": 3,
    "generator.ema_decay": 0.9,
    "compute.precision": "fp32",
    "compute.compile": "off",
    "log.interval": 10,
    "verify.num_samples": 384,
    "verify.min_class_agreement": 0.3,
    "verify.min_coverage": 0.3,
    "verify.min_fp16_agreement": 0.97,
    "verify.min_int8_agreement": 0.8,
    "calibration.num_images": 64,
}


class Canvases(NamedTuple):
    """Images (N, 1, 16, 16) uint8 and labels (N, 5) of 0 and 1."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class LabelTeacher(NamedTuple):
    """A dfadc teacher file and its mean accuracy of a label on canvases of held-out digits."""

    path: Path
    accuracy: float


def compose(count: int, *, seed: int, held_out: bool) -> Canvases:
    """Four quarters, each with a digit from 0 to 4 or nothing."""
    digits = load_digits()
    is_held_out = np.arange(len(digits.target)) % 4 == 0
    rng = np.random.default_rng(seed)
    chosen = np.flatnonzero((digits.target < 5) & (is_held_out == held_out))
    images, labels = np.zeros((count, 1, 16, 16), np.uint8), np.zeros((count, 5), np.int64)
    for image, label in zip(images[:, 0], labels, strict=True):
        for quarter in np.flatnonzero(rng.random(4) < 0.6):
            index = rng.choice(chosen)
            top, left = 8 * (quarter // 2), 8 * (quarter % 2)
            image[top : top + 8, left : left + 8] = np.rint(digits.images[index] * (255 / 16))
            label[digits.target[index]] = 1
    return Canvases(images, labels)


def normalise(images: NDArray[np.uint8]) -> torch.Tensor:
    """(N, 1, 16, 16) float32 as the contract says."""
    assert LABELS_CONTRACT.mean is not None
    assert LABELS_CONTRACT.std is not None
    return (torch.from_numpy(images).float() / 255 - LABELS_CONTRACT.mean[0]) / LABELS_CONTRACT.std[0]


def train(network: nn.Module, *, steps: int = NUM_STEPS) -> nn.Module:
    """Binary cross-entropy of each label, as everybody trains such networks."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, cycle_momentum=False)
    canvases = compose(2048, seed=0, held_out=False)
    images, labels = normalise(canvases.images), torch.from_numpy(canvases.labels).float()
    network.train()
    for step in range(steps):
        part = slice(64 * (step % 32), 64 * (step % 32) + 64)
        loss = functional.binary_cross_entropy_with_logits(network(images[part]), labels[part])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@pytest.fixture(scope="session")
def labels_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Canvases of held-out digits as an .npz file, as ``--data`` takes it."""
    canvases = compose(300, seed=1, held_out=True)
    path = tmp_path_factory.mktemp("labels") / "held_out.npz"
    np.savez(path, images=canvases.images, labels=canvases.labels)
    return path


@pytest.fixture(scope="session")
def label_teacher(session_folder: Path) -> LabelTeacher:
    """A batch-norm teacher of the digits on a canvas, trained once with a fixed seed."""

    def make(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = build_architecture("compact_resnet_16", LABELS_CONTRACT)
            network = train(built.module)
        canvases = compose(400, seed=2, held_out=True)
        with torch.no_grad():
            right = (network(normalise(canvases.images)) > 0).numpy() == (canvases.labels == 1)
        np.save(folder / "accuracy.npy", right.mean())
        save_network(
            folder / "labels.safetensors", network, architecture=built.name, stem=built.stem, contract=LABELS_CONTRACT
        )

    folder = made_once(session_folder / "label_teacher", make)
    accuracy = float(np.load(folder / "accuracy.npy"))
    assert accuracy >= LABEL_ACCURACY, f"the teacher of labels has {accuracy:.3f} of them right only"
    return LabelTeacher(folder / "labels.safetensors", accuracy)


@pytest.fixture(scope="session")
def label_run(label_teacher: LabelTeacher, labels_data: Path, session_folder: Path) -> RunFolder:
    """That teacher distilled, exported and verified by one command; what it printed lies beside the run."""

    def make(folder: Path) -> None:
        outcome = run_command(
            *("distill", label_teacher.path, "--student", "compact_resnet_8", *settings(QUICK_LABELS)),
            *("--out", folder / "run", "-e", "onnx", "-e", "onnx:fp16", "-e", "onnx:int8:ort-cpu", "-e", "kit"),
            *("--data", labels_data),
        )
        assert outcome.code == 0, outcome.err + outcome.out
        (folder / "out.txt").write_text(outcome.out)
        (folder / "err.txt").write_text(outcome.err)

    return dfadc.open_run(made_once(session_folder / "label_run", make) / "run")
