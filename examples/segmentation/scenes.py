"""Scenes for segmentation: real Fashion-MNIST garments placed on a canvas, and the class of every pixel.

    python examples/segmentation/scenes.py --out scenes.npz

writes held-out scenes, composed of images of the test set, as ``dfadc --data`` takes them. ``--data FOLDER`` names the
four idx files (on Debian the package ``dataset-fashion-mnist`` brings them).
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import typer

from dfadc.cli.script import run_as_script
from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.storage import atomic_write

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 64
GARMENT_SIDE = 28
NUM_GARMENTS = (2, 4)  # at least and at most, in a scene
#: A garment's corner lies this far from that of its quarter of the canvas: neighbours may overlap by a few pixels.
OFFSETS = (-2, 6)
#: Grey level above which a pixel of a garment's image is garment.
THRESHOLD = 16
BACKGROUND = 0
FOLDER = Path("/usr/share/datasets/fashion-mnist")
SCENES_FILE = Path(__file__).with_name("scenes_200.npz")
FILE_PREFIXES = {"train": "train", "test": "t10k"}

CONTRACT = ImageContract(
    input_size=(1, SIDE, SIDE),
    num_classes=11,
    mean=(0.163,),  # of 1,000 scenes of training images
    std=(0.303,),
    class_names=(
        "background",
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    task="segmentation",
)


class Scenes(NamedTuple):
    """Images (N, 1, 64, 64) and masks (N, 64, 64) of classes 0..10, both uint8."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


class Garments(NamedTuple):
    """Images (N, 28, 28) uint8 and labels (N,) of classes 0..9."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def main(
    *,
    data: Annotated[Path, typer.Option(help="Folder of the four idx files, .gz or not.")] = FOLDER,
    count: Annotated[int, typer.Option(min=1, help="Scenes to write.")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="The .npz to write.")] = SCENES_FILE,
) -> None:
    """Writes held-out scenes with their masks, for evaluation only."""
    scenes = compose_scenes(read_garments(data, "test"), count, seed=seed)
    with atomic_write(out) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, images=scenes.images, masks=scenes.masks)
    shares = np.bincount(scenes.masks.ravel(), minlength=CONTRACT.num_classes) / scenes.masks.size
    print(f"{count} scenes of the test images, {shares[BACKGROUND]:.1%} background; wrote {out}")


def compose_scenes(garments: Garments, count: int, *, seed: int) -> Scenes:
    """Places 2 to 4 garments into the quarters of each canvas, the later above the earlier."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 1, SIDE, SIDE), np.uint8)
    masks = np.full((count, SIDE, SIDE), BACKGROUND, np.uint8)
    for image, mask in zip(images[:, 0], masks, strict=True):
        quarters = rng.permutation(4)[: rng.integers(NUM_GARMENTS[0], NUM_GARMENTS[1] + 1)]
        for quarter, chosen in zip(quarters, rng.integers(len(garments.images), size=len(quarters)), strict=True):
            corner = np.array(divmod(int(quarter), 2)) * (SIDE // 2) + rng.integers(*OFFSETS, size=2, endpoint=True)
            top, left = np.clip(corner, 0, SIDE - GARMENT_SIDE)
            place = np.s_[top : top + GARMENT_SIDE, left : left + GARMENT_SIDE]
            garment = garments.images[chosen]
            is_garment = garment > THRESHOLD
            image[place][is_garment] = garment[is_garment]
            mask[place][is_garment] = garments.labels[chosen] + 1
    return Scenes(images, masks)


def read_garments(folder: Path, split: Literal["train", "test"]) -> Garments:
    """Reads a split of Fashion-MNIST.

    Raises:
        DfadcError: the folder lacks a file of the split, or the file is not idx.
    """
    prefix = FILE_PREFIXES[split]
    return Garments(read_idx(folder, f"{prefix}-images-idx3-ubyte"), read_idx(folder, f"{prefix}-labels-idx1-ubyte"))


def read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Reads an idx file of bytes: two zeros, type 8 (unsigned byte), number of axes, big-endian sides, values."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DfadcError(f"{folder} holds neither {name} nor {name}.gz", "give the folder of the four idx files")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content[:3] != b"\0\0\x08":
        raise DfadcError(f"{path} is not an idx file of unsigned bytes")
    num_axes = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=num_axes, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * num_axes).reshape(shape.tolist()).copy()


if __name__ == "__main__":
    run_as_script(main)
