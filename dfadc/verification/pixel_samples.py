"""Frozen samples of segmentation, and the reading of sample files of either task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from dfadc.errors import DfadcError
from dfadc.verification.archive import read_archive
from dfadc.verification.pixel_outputs import DenseOutputs, class_dtype, collect_dense
from dfadc.verification.samples import SCHEMA, FrozenImages, Layout, SampleSet

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from dfadc.contract import ImageContract
    from dfadc.verification.pixel_scores import Classes
    from dfadc.verification.stored_images import StoredImages

_IMAGES = ("images", "source", "positions")
_NETWORKS = ("teacher", "student")
_PARTS = ("classes", "margins", "logits")


@dataclass(frozen=True, slots=True)
class DenseSampleSet(FrozenImages):
    """Generated images that no network was trained on, with the dense outputs of teacher and fp32 student.

    The other fields are those of :class:`SampleSet`.

    Args:
        teacher: the teacher's outputs for :meth:`normalised`, at the images' size.
        student: the fp32 student's.
        positions: (P,) int32 pixels whose logits are kept, counted row by row.

    Raises:
        DfadcError: shapes, dtypes or indices contradict each other or the contract.
    """

    images: StoredImages
    source: npt.NDArray[np.int8]
    sources: tuple[str, ...]
    teacher: DenseOutputs
    student: DenseOutputs
    positions: npt.NDArray[np.int32]
    contract: ImageContract
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)

    array_names: ClassVar = (*_IMAGES, *(f"{network}_{part}" for network in _NETWORKS for part in _PARTS))

    def __post_init__(self) -> None:
        n, (_, height, width) = len(self.images), self.contract.input_size
        kept = (len(self.positions), self.contract.num_classes)
        layouts: dict[str, Layout] = {"positions": ((kept[0],), np.int32)}
        for network in _NETWORKS:
            layouts |= {
                f"{network}_classes": ((n, height, width), class_dtype(self.contract.num_classes)),
                f"{network}_margins": ((n, height, width), np.float16),
                f"{network}_logits": ((n, *kept), np.float32),
            }
        self.check(layouts)
        if len(self.positions) and not 0 <= self.positions.min() <= self.positions.max() < height * width:
            raise DfadcError(f"samples: a position lies outside 0..{height * width - 1}")

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a file, by name."""
        outputs = {
            f"{network}_{part}": getattr(getattr(self, network), part) for network in _NETWORKS for part in _PARTS
        }
        return {name: getattr(self, name) for name in _IMAGES} | outputs

    @classmethod
    def array_fields(cls, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a set from the arrays of a file."""
        outputs = {
            network: DenseOutputs(**{part: arrays[f"{network}_{part}"] for part in _PARTS}) for network in _NETWORKS
        }
        return {name: arrays[name] for name in _IMAGES} | outputs

    @property
    def teacher_outputs(self) -> DenseOutputs:
        """The teacher's outputs."""
        return self.teacher

    @property
    def student_outputs(self) -> DenseOutputs:
        """The fp32 student's outputs."""
        return self.student

    @property
    def teacher_classes(self) -> Classes:
        """(N, H, W) the teacher's classes."""
        return self.teacher.classes

    def collect(self, batches: Iterable[npt.NDArray[np.float32]], network: str) -> DenseOutputs:
        """Dense outputs of a network, from its logits (n, K, H, W) for each of :meth:`batches`.

        Raises:
            DfadcError: the logits do not fit these samples.
        """
        outputs = collect_dense(batches, self.positions, contract=self.contract, network=network)
        self.check_complete(len(outputs), network)
        return outputs


Samples = SampleSet | DenseSampleSet


def load_samples(path: Path) -> Samples:
    """Reads a sample file of either task and checks its images against its hash.

    Raises:
        DfadcError: the file is missing, damaged, of another schema, or its images are not the hashed ones.
    """
    contract = read_archive(path, (), schema=SCHEMA, kind="sample file")[0].get("contract") if path.exists() else None
    is_dense = isinstance(contract, dict) and contract.get("task") == "segmentation"
    return (DenseSampleSet if is_dense else SampleSet).load(path)
