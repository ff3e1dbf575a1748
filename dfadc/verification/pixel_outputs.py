"""Segmentation outputs in compact form: classes, margins and the logits of a few pixels. numpy only.

All logits of all pixels would be many times the size of the images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Self

    from dfadc.contract import ImageContract
    from dfadc.verification.pixel_scores import Classes

#: Pixels of each image whose logits are kept.
NUM_POSITIONS = 32


@dataclass(frozen=True, slots=True)
class DenseOutputs:
    """A segmentation network's outputs for some images, without most of its logits.

    Args:
        classes: (N, H, W) uint8, or uint16 from 255 classes; the dtype's highest value, which is no class, where a
            logit is NaN or infinite.
        margins: (N, H, W) float16, highest minus second highest logit.
        logits: (N, P, K) float32, all logits of a few pixels.
    """

    classes: Classes
    margins: npt.NDArray[np.float16]
    logits: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, part: Any) -> Self:
        return replace(self, classes=self.classes[part], margins=self.margins[part], logits=self.logits[part])

    @property
    def no_class(self) -> int:
        """The class value of a pixel without a class."""
        return int(np.iinfo(self.classes.dtype).max)

    @classmethod
    def of(cls, logits: npt.NDArray[np.float32], positions: npt.NDArray[np.int32]) -> Self:
        """Reduces logits (N, K, H, W); positions: (P,) pixels whose logits are kept, counted row by row."""
        n, num_classes, height, width = logits.shape
        dtype = class_dtype(num_classes)
        finite = np.asarray(np.isfinite(logits).all(axis=1))
        top_two = np.partition(np.where(finite[:, None], logits, 0), num_classes - 2, axis=1)[:, -2:]
        margins = np.minimum(top_two[:, 1] - top_two[:, 0], np.finfo(np.float16).max).astype(np.float16)
        classes: Classes = np.where(finite, logits.argmax(axis=1), np.iinfo(dtype).max).astype(dtype)
        kept = logits.reshape(n, num_classes, height * width)[:, :, positions].transpose(0, 2, 1)
        return cls(classes, margins, np.ascontiguousarray(kept, np.float32))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Concatenates at least one part."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


#: A network's outputs for samples: logits (N, K), or dense outputs.
Outputs = npt.NDArray[np.float32] | DenseOutputs


def class_dtype(num_classes: int) -> type[np.uint8 | np.uint16]:
    """The smallest dtype that holds the classes and one value more."""
    return np.uint8 if num_classes < np.iinfo(np.uint8).max else np.uint16


def choose_positions(height: int, width: int) -> npt.NDArray[np.int32]:
    """(P,) pixels whose logits are kept, at random over the image and always the same."""
    number = min(NUM_POSITIONS, height * width)
    return np.sort(np.random.default_rng(0).choice(height * width, number, replace=False)).astype(np.int32)


def collect_dense(
    batches: Iterable[npt.NDArray[np.float32]],
    positions: npt.NDArray[np.int32],
    *,
    contract: ImageContract,
    network: str,
) -> DenseOutputs:
    """Reduces logits (n, K, H, W) batch by batch.

    Raises:
        DfadcError: the outputs of ``network`` have another shape than the contract's.
    """
    shape = (0, contract.num_classes, *contract.input_size[1:])
    parts = [DenseOutputs.of(np.empty(shape, np.float32), positions)]
    for logits in batches:
        check_output_shape(logits.shape, contract, network)
        parts.append(DenseOutputs.of(logits, positions))
    return DenseOutputs.join(parts)


def check_output_shape(shape: tuple[int, ...], contract: ImageContract, network: str) -> None:
    """Refuses logits (n, K) or (n, K, H, W) of another shape than the contract's.

    Raises:
        DfadcError: the shapes differ.
    """
    expected = (contract.num_classes, *(contract.input_size[1:] if contract.is_dense else ()))
    if shape[1:] != expected:
        needed = f"have {contract.num_classes} classes" if len(expected) == 1 else f"need {expected}"
        raise DfadcError(
            f"the output of {network} for an image is {shape[1:]}, the samples {needed}",
            "verify it with the samples of its own run",
        )


def batch_size(contract: ImageContract, most: int) -> int:
    """Images of a batch: ``most``, or as many as have 64 MiB of logits."""
    if not contract.is_dense:
        return most
    _, height, width = contract.input_size
    return max(1, min(most, 64 * 2**20 // (4 * contract.num_classes * height * width)))
