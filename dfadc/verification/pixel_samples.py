"""Frozen samples whose every pixel was answered, and the reading of sample files of either kind.

All logits of all pixels would be many times the images; what is kept of them is :class:`.dense.DenseAnswers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.verification.pixel_agreement import DenseAnswers, class_dtype
from dfadc.verification.samples import SCHEMA, FrozenImages, SampleSet, check_answers, read_archive

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from dfadc.verification.stored_images import StoredImages

_NETWORKS = ("teacher", "student")
_PARTS = ("classes", "margins", "logits")


@dataclass(frozen=True, slots=True)
class DenseSampleSet(FrozenImages):
    """Images that nobody trained on, where each came from, and what teacher and student answer to every pixel.

    Args:
        images: as in :class:`SampleSet`.
        source: likewise.
        sources: likewise.
        teacher: the teacher's answers to :meth:`normalised`, at the images' size.
        student: the fp32 student's.
        positions: (P,) int32 pixels whose logits are kept, counted row by row.
        contract: of the images and logits.
        provenance: plain values on how the set was made.

    Raises:
        DfadcError: shapes, dtypes or indices contradict each other or the contract.
    """

    images: StoredImages
    source: npt.NDArray[np.int8]
    sources: tuple[str, ...]
    teacher: DenseAnswers
    student: DenseAnswers
    positions: npt.NDArray[np.int32]
    contract: ImageContract
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)

    array_names: ClassVar = (
        *("images", "source", "positions"),
        *(f"{network}_{part}" for network in ("teacher", "student") for part in ("classes", "margins", "logits")),
    )

    def __post_init__(self) -> None:
        n, (_, height, width) = len(self.images), self.contract.input_size
        kept = (len(self.positions), self.contract.num_classes)
        expected: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {"positions": ((kept[0],), np.int32)}
        for network in _NETWORKS:
            expected |= {
                f"{network}_classes": ((n, height, width), class_dtype(self.contract.num_classes)),
                f"{network}_margins": ((n, height, width), np.float16),
                f"{network}_logits": ((n, *kept), np.float32),
            }
        self.check(expected)
        if len(self.positions) and not 0 <= self.positions.min() <= self.positions.max() < height * width:
            raise DfadcError(f"samples: a position lies outside 0..{height * width - 1}")

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a file, by name."""
        answers = {
            f"{network}_{part}": getattr(getattr(self, network), part) for network in _NETWORKS for part in _PARTS
        }
        return {"images": self.images, "source": self.source, "positions": self.positions, **answers}

    @property
    def teacher_answers(self) -> DenseAnswers:
        """The teacher's."""
        return self.teacher

    @property
    def student_answers(self) -> DenseAnswers:
        """The fp32 student's."""
        return self.student

    def collect(self, batches: Iterable[npt.NDArray[np.float32]], who: str) -> DenseAnswers:
        """What ``who`` answered with logits (n, K, H, W) to one batch after the other, digested batch by batch.

        Raises:
            DfadcError: that is no answer to these samples.
        """
        answers = collect_dense(batches, self.positions, contract=self.contract, who=who)
        if len(answers) != len(self):
            raise DfadcError(f"{who} answers {len(answers)} of {len(self)} samples")
        return answers

    @classmethod
    def from_parts(cls, metadata: Mapping[str, Any], arrays: Mapping[str, Any], path: Path) -> DenseSampleSet:
        """A set from what was read of ``path``, its images checked against its hash.

        Raises:
            DfadcError: something is missing or contradicts the rest, or the images are not the hashed ones.
        """
        answers = {
            network: DenseAnswers(**{part: arrays[f"{network}_{part}"] for part in _PARTS}) for network in _NETWORKS
        }
        try:
            samples = cls(
                images=arrays["images"],
                source=arrays["source"],
                positions=arrays["positions"],
                **answers,
                sources=tuple(map(str, metadata["sources"])),
                contract=ImageContract.from_dict(metadata["contract"]),
                provenance=metadata["provenance"],
            )
            samples.check_unchanged(metadata["sha256"], path)
        except (KeyError, TypeError) as exc:
            raise DfadcError(
                f"{path}: the samples' metadata is incomplete: {exc}", "take it from the run again"
            ) from exc
        return samples


Samples = SampleSet | DenseSampleSet


def load_samples(path: Path) -> Samples:
    """Reads a sample file of either task and checks its images against its hash.

    Raises:
        DfadcError: the file is missing, damaged, of another schema, or its images are not the hashed ones.
    """
    if path.exists():
        metadata, _ = read_archive(path, (), schema=SCHEMA, what="sample file")
        contract = metadata.get("contract")
        if isinstance(contract, dict) and contract.get("task") == "segmentation":
            metadata, arrays = read_archive(path, DenseSampleSet.array_names, schema=SCHEMA, what="sample file")
            return DenseSampleSet.from_parts(metadata, arrays, path)
    return SampleSet.load(path)


def collect_dense(
    batches: Iterable[npt.NDArray[np.float32]],
    positions: npt.NDArray[np.int32],
    *,
    contract: ImageContract,
    who: str,
) -> DenseAnswers:
    """Logits (n, K, H, W) of one batch after the other, digested as they come.

    Raises:
        DfadcError: ``who`` answers with another shape than the contract's.
    """
    shape = (0, contract.num_classes, *contract.input_size[1:])
    digested = [DenseAnswers.of(np.empty(shape, np.float32), positions)]
    for logits in batches:
        check_answers(logits.shape, contract, who)
        digested.append(DenseAnswers.of(logits, positions))
    return DenseAnswers.join(digested)


def batch_size(contract: ImageContract, most: int) -> int:
    """How many images are asked at once: ``most``, or as many as have 64 MiB of logits."""
    if contract.task == "classification":
        return most
    _, height, width = contract.input_size
    return max(1, min(most, 64 * 2**20 // (4 * contract.num_classes * height * width)))
