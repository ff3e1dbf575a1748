"""Fixtures of dense answers, all real: scenes of digits with masks, a teacher that segments them, a run of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
from command_line import run_command, settings
from sklearn.datasets import load_digits
from torch.nn import functional

import dfadc
from dfadc.contract import ImageContract
from dfadc.networks.logits import answering_pixels
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import save_network

if TYPE_CHECKING:
    from pathlib import Path

    from command_line import Outcome
    from numpy.typing import NDArray

    from dfadc.run_folder import RunFolder

#: Neither square nor a multiple of the network's strides.
SCENE_CONTRACT = ImageContract(
    (1, 37, 51),
    3,
    mean=(0.08,),
    std=(0.24,),
    class_names=("background", "zero", "one"),
    task="segmentation",
)
DIGITS = (0, 1)
#: What the teacher reaches on scenes of held-out digits before any test may rely on it.
SCENE_IOU = 0.6
NUM_STEPS = 120
QUICK_SCENES = {
    "steps": 30,
    "batch_size": 8,
    "student.steps": 3,
    "student.ema_decay": 0.9,
    "replay.repeats": 2,
    "generator.ema_decay": 0.9,
    "compute.precision": "fp32",
    "compute.compile": "off",
    "log.interval": 10,
    "verify.num_samples": 64,
    "verify.min_agreement": 0.3,
    "verify.min_coverage": 0.1,
    "calibration.num_images": 64,
}


class Scenes(NamedTuple):
    """Images (N, 1, 37, 51) and masks (N, 37, 51), both uint8."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


class SceneTeacher(NamedTuple):
    """A dfadc teacher file and its mean IoU on scenes of held-out digits."""

    path: Path
    mean_iou: float


def compose(count: int, *, seed: int, held_out: bool) -> Scenes:
    """Two digits, doubled, one left and one right, at random places of each canvas."""
    digits = load_digits()
    is_held_out = np.arange(len(digits.target)) % 4 == 0
    chosen = np.flatnonzero(np.isin(digits.target, DIGITS) & (is_held_out == held_out))
    rng = np.random.default_rng(seed)
    images, masks = np.zeros((count, 1, 37, 51), np.uint8), np.zeros((count, 37, 51), np.uint8)
    for image, mask in zip(images[:, 0], masks, strict=True):
        for half, index in enumerate(rng.choice(chosen, 2)):
            top, left = rng.integers(0, 22), 25 * half + rng.integers(0, 10)
            place = np.s_[top : top + 16, left : left + 16]
            digit = digits.images[index].repeat(2, axis=0).repeat(2, axis=1)
            image[place] = np.maximum(image[place], np.rint(digit * (255 / 16)).astype(np.uint8))
            mask[place][digit > 4] = DIGITS.index(int(digits.target[index])) + 1
    return Scenes(images, masks)


@pytest.fixture(scope="session")
def scenes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of held-out digits as an .npz file, as ``--data`` takes it; the upper row of each is not labelled."""
    scenes = compose(40, seed=1, held_out=True)
    scenes.masks[:, 0] = 255
    path = tmp_path_factory.mktemp("scenes") / "held_out.npz"
    np.savez(path, images=scenes.images, masks=scenes.masks)
    return path


@pytest.fixture(scope="session")
def scene_teacher(tmp_path_factory: pytest.TempPathFactory) -> SceneTeacher:
    """A batch-norm teacher that segments digits, trained once a session with a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build_architecture("compact_unet_8", SCENE_CONTRACT)
        network = answering_pixels(built.module, SCENE_CONTRACT)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=NUM_STEPS, cycle_momentum=False)
        train = [torch.from_numpy(part) for part in compose(480, seed=0, held_out=False)]
        for step in range(NUM_STEPS):
            images, masks = (part[32 * (step % 15) :][:32] for part in train)
            loss = functional.cross_entropy(network(normalise(images)), masks.long())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    images, masks = (torch.from_numpy(part) for part in compose(100, seed=2, held_out=True))
    with torch.no_grad():
        classes = network.eval()(normalise(images)).argmax(dim=1)
    overlaps = [((classes == c) & (masks == c)).sum() / ((classes == c) | (masks == c)).sum() for c in range(3)]
    mean_iou = float(torch.stack(overlaps).mean())
    assert mean_iou >= SCENE_IOU, f"the teacher of scenes reached a mean IoU of {mean_iou:.3f} only"
    path = tmp_path_factory.mktemp("scene_teacher") / "scenes.safetensors"
    save_network(path, built.module, architecture=built.name, stem=built.stem, contract=SCENE_CONTRACT)
    return SceneTeacher(path, mean_iou)


@pytest.fixture(scope="session")
def scene_run(
    scene_teacher: SceneTeacher, scenes_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, Outcome]:
    """That teacher distilled, exported and verified by one command, and what it printed."""
    folder = tmp_path_factory.mktemp("scene_run") / "run"
    outcome = run_command(
        *("distill", scene_teacher.path, "--student", "compact_unet_9", *settings(QUICK_SCENES), "--out", folder),
        *("-e", "onnx", "-e", "onnx:fp16", "-e", "onnx:int8:ort-cpu", "-e", "kit", "--data", scenes_data, "--json"),
    )
    assert outcome.code == 0, outcome.err
    return dfadc.open_run(folder), outcome


def normalise(images: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) uint8 -> float32 as the contract says."""
    assert SCENE_CONTRACT.mean is not None
    assert SCENE_CONTRACT.std is not None
    return (images.float() / 255 - SCENE_CONTRACT.mean[0]) / SCENE_CONTRACT.std[0]
